"use strict";
// Everything shown goes in as text, never as markup: passages are other people's.
const $ = (id) => document.getElementById(id);
const RATIOS = [1, 2, 4, 8, 16, 32];
const FIRST = 8; // of a collection
const STATUS = { hit: "stored", encoded: "encoded on demand", too_long: "too long" };
const stored = new Map([["", 1]]); // ratio of every collection; texts are encoded at 1

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function call(path, body) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = "Bearer " + $("key").value;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw new Error((answer.error && answer.error.message) || response.statusText);
  return answer;
}

function say(text, wrong) {
  $("said").textContent = text;
  $("said").className = wrong ? "wrong" : "";
}

function sourceChanged() {
  const collection = $("collection").value;
  $("texts").hidden = Boolean(collection);
  $("ids").hidden = !collection;
  const finest = stored.get(collection);
  const offered = RATIOS.filter((ratio) => ratio % finest === 0);
  const old = $("ratio").value;
  $("ratio").replaceChildren(...offered.map((ratio) => make("option", "", String(ratio))));
  if (offered.map(String).includes(old)) $("ratio").value = old;
}

async function learn() {
  try {
    const models = (await call("/v1/models")).data.filter((one) => one.fingerprint); // the others read text, at no ratio
    const old = $("model").value;
    $("model").replaceChildren(...models.map((one) => make("option", "", one.id)));
    if (models.some((one) => one.id === old)) $("model").value = old;
    $("models").hidden = models.length < 2;
    const shown = models.map((one) => `${one.id}, ${one.dtype} on ${one.device}`);
    $("about").textContent = shown.join("; ") || "No model here reads kept states; this page has nothing to show.";
    for (const one of (await call("/v1/collections")).data) {
      if (!stored.has(one.id)) {
        const many = one.num_passages === 1 ? "1 passage" : `${one.num_passages} passages`;
        const option = make("option", "", `${one.id} (${many}, ratio ${one.compression_ratio})`);
        option.value = one.id;
        $("collection").append(option);
      }
      stored.set(one.id, one.compression_ratio);
    }
  } catch (error) {
    say(error.message, true);
  }
}

function asked() {
  const body = { query: $("query").value, compression_ratio: Number($("ratio").value) || undefined };
  if ($("model").value) body.model = $("model").value;
  if ($("instruction").value.trim()) body.instruction = $("instruction").value;
  const collection = $("collection").value;
  if (!collection) return { ...body, documents: $("passages").value.split("\n").filter((line) => line.trim()) };
  const ids = $("wanted").value.split(/\s+/).filter(Boolean);
  return ids.length ? { ...body, collection, passage_ids: ids } : { ...body, collection, first: FIRST };
}

function highlighted(result) {
  const text = make("p", "text");
  if (!result.text) {
    text.textContent = "(this collection keeps no texts)";
    return text;
  }
  const characters = Array.from(result.text); // offsets count code points, strings here count UTF-16
  const largest = Math.max(...result.parts.map((part) => part.weight), 1e-9);
  let done = 0;
  for (const part of result.parts) {
    const begin = Math.max(done, part.begin);
    if (begin >= part.end) continue;
    text.append(characters.slice(done, begin).join(""));
    const mark = make("mark", "", characters.slice(begin, part.end).join(""));
    mark.style.backgroundColor = `rgba(var(--mark), ${(0.65 * part.weight / largest).toFixed(3)})`;
    mark.title = `weight ${part.weight.toFixed(4)}`;
    text.append(mark);
    done = part.end;
  }
  text.append(characters.slice(done).join(""));
  return text;
}

function row(head, scores, ratio, cell) {
  const line = make("tr");
  head.scope = "row";
  line.append(head);
  for (const one of scores) line.append(make("td", one.compression_ratio === ratio ? "chosen" : "", cell(one)));
  return line;
}

function ratios(scores, ratio) {
  return row(make("th", "", "ratio"), scores, ratio, (one) => String(one.compression_ratio));
}

function table(result, ratio) {
  const grid = make("table");
  const add = (name, cell) => grid.append(row(make("th", "", name), result.scores, ratio, cell));
  grid.append(ratios(result.scores, ratio));
  add("score", (one) => one.score.toFixed(3));
  add("states", (one) => String(one.num_states));
  add("ms", (one) => (one.seconds * 1000).toFixed(1));
  const around = make("div", "scroll");
  around.append(grid);
  return around;
}

function nameOf(result) {
  return result.passage_id || `passage ${result.index + 1}`;
}

function overview(results, ratio) {
  const scored = results.filter((one) => one.scores.length);
  if (scored.length < 2) return [];
  const grid = make("table");
  grid.append(make("caption", "", "Scores at every ratio"), ratios(scored[0].scores, ratio));
  scored.forEach((result, i) => {
    const head = make("th");
    const link = make("a", "", `${i + 1}. ${nameOf(result)}`);
    link.href = `#place-${i + 1}`;
    head.append(link);
    grid.append(row(head, result.scores, ratio, (one) => one.score.toFixed(3)));
  });
  return [grid];
}

function card(result, place, ratio) {
  const item = make("li");
  item.id = `place-${place}`;
  const head = make("div", "head");
  const at = result.scores.find((one) => one.compression_ratio === ratio);
  head.append(make("b", "", at ? `${place}. ${at.score.toFixed(3)}` : "not scored"));
  head.append(make("span", "id", nameOf(result)));
  head.append(make("span", "status", STATUS[result.status] || result.status));
  if (at) head.append(make("span", "", `${(at.seconds * 1000).toFixed(1)} ms`));
  if (result.parts.length) head.append(make("span", "", `${(result.passage_weight * 100).toFixed(0)} % of attention on it`));
  item.append(head);
  if (result.message) item.append(make("p", "hint", result.message));
  item.append(highlighted(result));
  if (result.scores.length) item.append(table(result, ratio));
  return item;
}

async function rank(event) {
  event.preventDefault();
  $("go").disabled = true;
  say("Reading…");
  try {
    const ratio = Number($("ratio").value);
    const answer = await call("/v1/explain", asked());
    $("overview").replaceChildren(...overview(answer.results, ratio));
    $("results").replaceChildren(...answer.results.map((result, i) => card(result, i + 1, ratio)));
    $("legend").hidden = false;
    const many = answer.results.length === 1 ? "1 passage" : `${answer.results.length} passages`;
    const which = $("collection").value && !$("wanted").value.trim() ? `The first ${many} of ${$("collection").value}` : many;
    say(`${which} in ${(answer.seconds * 1000).toFixed(0)} ms, at every ratio`);
  } catch (error) {
    say(error.message, true);
  } finally {
    $("go").disabled = false;
  }
}

$("ask").addEventListener("submit", rank);
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey) $("ask").requestSubmit();
});
$("collection").addEventListener("change", sourceChanged);
$("key").addEventListener("change", learn);
sourceChanged();
learn();
