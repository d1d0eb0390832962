// Results: a column for each model, and a table that compares them.
import { make } from "./dom.js";
import { margins, milliseconds, scores } from "./numbers.js";

const STATUS = { hit: "stored", encoded: "encoded on demand", too_long: "too long", cut: "cut at the model's limit" };

// What a model said of the passages, in one shape for both paths: results best first, and what it left out.
export function read({ model, ratio, body, path }, answer) {
  const name = (index) => (body.passage_ids ? body.passage_ids[index] : `passage ${index + 1}`);
  if (path === "/v1/explain") {
    const results = answer.results.map((one) => {
      const at = one.scores.find((score) => score.compression_ratio === ratio);
      return { ...one, name: name(one.index), ...(at && { score: at.score, margin: at.margin, seconds: at.seconds }) };
    });
    return { model, ratio, results, warnings: [] };
  }
  const results = answer.results.map((one) => {
    const text = one.document ? one.document.text : null;
    const scored = { index: one.index, name: name(one.index), score: one.relevance_score, margin: one.margin };
    return { ...scored, text, status: one.truncated ? "cut" : "", message: "", scores: [], parts: [] };
  });
  // The cards say which texts were cut.
  const warnings = (answer.meta.warnings || []).filter((one) => !one.includes(" was cut: "));
  return { model, results, warnings };
}

const isScored = (one) => one.margin !== undefined;

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
    mark.style.backgroundColor = `rgba(var(--mark), ${((0.65 * part.weight) / largest).toFixed(3)})`;
    mark.title = `weight ${part.weight.toFixed(4)}`;
    text.append(mark);
    done = part.end;
  }
  text.append(characters.slice(done).join(""));
  return text;
}

function row(head, cells) {
  const line = make("tr");
  head.scope = "row";
  line.append(head, ...cells);
  return line;
}

// Rows of the same ratios; `cell` shows a score of `one`, with the ratio's place among them.
function atRatios(head, one, ratio, cell) {
  const chosen = (score) => (score.compression_ratio === ratio ? "chosen" : "");
  return row(head, one.scores.map((score, place) => make("td", chosen(score), cell(score, place))));
}

function scrolling(table) {
  const around = make("div", "scroll");
  around.tabIndex = 0; // with the arrow keys
  around.setAttribute("role", "region");
  around.setAttribute("aria-label", table.caption ? table.caption.textContent : "Scores of this passage at every ratio");
  around.append(table);
  return around;
}

// How scores and margins of each ratio are shown, over all results.
function formats({ results }) {
  const shape = results.find((one) => one.scores.length);
  if (!shape) return [];
  const scored = results.filter((one) => one.scores.length === shape.scores.length);
  return shape.scores.map((_, place) => ({
    score: scores(scored.map((one) => one.scores[place].score)),
    margin: margins(scored.map((one) => one.scores[place].margin)),
  }));
}

function table(result, ratio, shown) {
  const grid = make("table");
  const add = (name, cell) => grid.append(atRatios(make("th", "", name), result, ratio, cell));
  add("ratio", (one) => String(one.compression_ratio));
  add("score", (one, place) => shown[place].score(one.score));
  add("margin", (one, place) => shown[place].margin(one.margin));
  add("states", (one) => String(one.num_states));
  add("ms", (one) => (one.seconds * 1000).toFixed(1));
  return scrolling(grid);
}

// Leads to a card; the address stays that of the form.
function lead(text, card) {
  const link = make("button", "lead", text);
  link.type = "button";
  link.addEventListener("click", () => {
    card.scrollIntoView({ block: "start" });
    card.focus({ preventScroll: true });
  });
  return link;
}

function overview(column, cards, shown) {
  const scored = column.results.filter((one) => one.scores.length);
  if (scored.length < 2) return [];
  const grid = make("table");
  grid.append(make("caption", "", "Scores at every ratio"));
  grid.append(atRatios(make("th", "", "ratio"), scored[0], column.ratio, (one) => String(one.compression_ratio)));
  scored.forEach((result, i) => {
    const head = make("th");
    head.append(lead(`${i + 1}. ${result.name}`, cards.get(result.index)));
    grid.append(atRatios(head, result, column.ratio, (one, place) => shown[place].score(one.score)));
  });
  return [scrolling(grid)];
}

function card(result, place, show) {
  const item = make("li");
  item.tabIndex = -1;
  const head = make("div", "head");
  const add = (className, text) => head.append(make("span", className, text));
  head.append(make("b", "", isScored(result) ? `${place}. ${show.score(result.score)}` : "not scored"));
  if (isScored(result)) add("margin", `margin ${show.margin(result.margin)}`);
  add("id", result.name);
  if (result.status) add("status", STATUS[result.status] || result.status);
  if (show.byWords) add("", `found as no. ${result.index + 1} by words`);
  if (result.seconds !== undefined) add("", milliseconds(result.seconds));
  if (result.parts.length) add("", `${(result.passage_weight * 100).toFixed(0)} % of attention on it`);
  item.append(head);
  if (result.message) item.append(make("p", "hint", result.message));
  item.append(highlighted(result));
  return item;
}

// The section of one model; `cards` gets its cards by the passage's place in the request.
export function section(column, cards, byWords) {
  const section = make("section", "column");
  section.append(make("h2", "", column.model.id));
  const reads = column.ratio ? `states at ratio ${column.ratio}` : "text";
  if (column.error) {
    section.append(make("p", "wrong", column.error));
    return section;
  }
  section.append(make("p", "hint", `Reads ${reads}; ${milliseconds(column.seconds)} there and back`));
  const scored = column.results.filter(isScored);
  const show = {
    score: scores(scored.map((one) => one.score)),
    margin: margins(scored.map((one) => one.margin)),
    byWords,
  };
  const shown = formats(column);
  const list = make("ol");
  column.results.forEach((result, i) => {
    const item = card(result, i + 1, show);
    if (result.scores.length) item.append(table(result, column.ratio, shown));
    cards.set(result.index, item);
    list.append(item);
  });
  section.append(...overview(column, cards, shown), list);
  section.append(...column.warnings.map((one) => make("p", "hint", one)));
  return section;
}

// Places, scores and margins of the same passages under two models, in the order of the first.
export function comparison(columns, cardsOf) {
  const placed = columns.map(({ results }) => new Map(results.filter(isScored).map((one, i) => [one.index, [i + 1, one]])));
  const shown = columns.map(({ results }) => {
    const scored = results.filter(isScored);
    return [scores(scored.map((one) => one.score)), margins(scored.map((one) => one.margin))];
  });
  const names = new Map(columns.flatMap(({ results }) => results.map((one) => [one.index, one.name])));
  const last = names.size + 1;
  const place = (index, side) => (placed[side].get(index) || [last])[0];
  const order = [...names.keys()].sort((a, b) => place(a, 0) - place(b, 0) || place(a, 1) - place(b, 1) || a - b);
  const grid = make("table");
  grid.append(make("caption", "", "The same passages under both models"));
  const heads = [make("th", "", "passage"), ...columns.map(({ model }) => make("th", "model", model.id))];
  heads.forEach((head) => (head.scope = "col"));
  heads.slice(1).forEach((head) => (head.colSpan = 3));
  const first = make("tr");
  first.append(...heads);
  const second = make("tr");
  second.append(...["", ...columns.flatMap(() => ["no.", "score", "margin"])].map((text) => make("td", "of", text)));
  grid.append(first, second);
  for (const index of order) {
    const head = make("th");
    const card = cardsOf[0].get(index) || cardsOf[1].get(index);
    head.append(lead(names.get(index), card));
    const cells = placed.flatMap((side, i) => {
      const [at, one] = side.get(index) || ["–"];
      const moved = i === 1 && at !== place(index, 0) ? "moved" : "";
      const told = one ? [shown[i][0](one.score), shown[i][1](one.margin)] : ["–", "–"];
      return [make("td", moved, one ? `${at}.` : at), ...told.map((text) => make("td", "", text))];
    });
    grid.append(row(head, cells));
  }
  return scrolling(grid);
}
