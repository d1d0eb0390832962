// The page at /: what its buttons do.
import { asCurl, call, CallFailed, key } from "./api.js";
import { $ } from "./dom.js";
import * as form from "./form.js";
import { count } from "./numbers.js";
import { comparison, read, section } from "./results.js";
import { drop, upload } from "./uploads.js";

let repeat = null; // what a key was missing for
let turn = 0; // of the latest action: what an earlier one still brings is not shown

function say(text, wrong) {
  $("said").textContent = text;
  $("said").className = wrong ? "wrong" : "";
  // On a phone it stands below the form.
  if (text && $("said").getBoundingClientRect().top > innerHeight) $("said").scrollIntoView();
}

function clear() {
  for (const id of ["comparison", "columns", "commands"]) $(id).replaceChildren();
  $("outcome").hidden = true;
}

// Runs what a button does, which is told how to find out that a later one began. An error takes the place of what was
// shown; one about the key asks for another.
async function attempt(action) {
  const own = ++turn;
  const isLatest = () => own === turn;
  const focused = document.activeElement;
  clear();
  document.body.className = "busy";
  for (const button of document.querySelectorAll("main button")) button.disabled = true;
  try {
    await action(isLatest);
    if (!isLatest()) return;
    $("asked").textContent = "";
    $("keys").hidden = $("forget").hidden = !key.get();
    repeat = null;
  } catch (error) {
    if (!isLatest()) return;
    clear();
    if (error instanceof CallFailed && error.needsKey) ask(error, action);
    else say(error.message, true);
  } finally {
    if (isLatest()) {
      document.body.className = "idle";
      for (const button of document.querySelectorAll("main button")) button.disabled = false;
      if (document.activeElement === document.body && focused) focused.focus({ preventScroll: true });
    }
  }
}

function ask(error, action) {
  if (error.keyIsWrong) key.set("");
  repeat = action;
  say("");
  $("asked").textContent = error.message;
  $("keys").hidden = false;
  $("forget").hidden = !key.get();
  $("key").value = "";
  $("key").focus();
}

async function learn() {
  await form.learn();
  say("");
}

async function find(finding, collection) {
  const { data } = await call(finding.path, { body: finding.body });
  if (data.length) return data.slice(0, finding.number).map((one) => one.id);
  if (!finding.body) throw new Error(`${collection} has no passages`);
  throw new Error(`no passage of ${collection} has a word of “${finding.body.query}”`);
}

async function rank(isLatest) {
  if (!form.isLearned()) await form.learn();
  say("Reading…");
  // All of the form as it is now: it may be changed while the server works.
  const [finding, calls, fragment] = [form.findingCall(), form.rankingCalls(), form.toFragment()];
  if (finding) {
    const ids = await find(finding, calls[0].body.collection);
    for (const one of calls) one.body.passage_ids = ids;
  }
  const columns = await Promise.all(
    calls.map(async (one) => {
      const start = performance.now();
      try {
        const answer = await call(one.path, { body: one.body });
        return { ...read(one, answer), seconds: (performance.now() - start) / 1000 };
      } catch (error) {
        // Of two models one may rank; an error of both, or of the key, is the page's.
        if (error.needsKey || calls.length === 1) throw error;
        return { model: one.model, error: error.message, results: [], warnings: [] };
      }
    }),
  );
  if (!isLatest()) return;
  if (columns.every((one) => one.error)) throw new Error(columns[0].error);
  history.replaceState(null, "", `#${fragment}`); // so that a reload keeps the form
  show(columns, finding, calls);
}

function show(columns, finding, calls) {
  const cards = columns.map(() => new Map());
  const byWords = Boolean(finding && finding.body);
  $("columns").replaceChildren(...columns.map((one, i) => section(one, cards[i], byWords)));
  $("columns").className = columns.length > 1 ? "two" : "";
  if (columns.length > 1 && columns.every((one) => !one.error)) $("comparison").append(comparison(columns, cards));
  $("legend").hidden = !columns.some((one) => one.ratio && !one.error);
  const commands = [finding, ...calls].filter(Boolean).map(asCurl);
  $("commands").textContent = commands.join("\n");
  $("outcome").hidden = false;
  const number = Math.max(...columns.map((one) => one.results.length));
  say(`${count(number, "passage")} for “${calls[0].body.query}”`);
}

async function copy(text, done, otherwise) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
  } catch {
    otherwise(); // over plain HTTP to another machine, a browser lets no page copy
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(rank);
});
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey) $("ask").requestSubmit();
});
for (const name of ["collection", "by", "model", "beside"]) $(name).addEventListener("change", form.arrange);

$("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    $("asked").textContent = "The API key is empty or has a space or another character than ASCII; expected ASCII";
    return;
  }
  key.set(given);
  $("key").value = "";
  const again = repeat;
  attempt(async (isLatest) => {
    await learn();
    if (again && again !== learn) await again(isLatest);
  });
});
$("forget").addEventListener("click", () => {
  key.set("");
  clear();
  attempt(learn);
});

$("upload").addEventListener("click", () =>
  attempt(async () => {
    say("Uploading…");
    const { name, told } = await upload($("file").files[0]);
    form.choose("collection", name);
    await form.learnCollections();
    $("file").value = "";
    say(`${told}; drop it when you are done`);
  }),
);
$("drop").addEventListener("click", () =>
  attempt(async () => {
    const told = await drop(form.value("collection"));
    await form.learnCollections();
    say(told);
  }),
);
$("curl").addEventListener("click", () =>
  copy($("commands").textContent, "Commands copied", () => {
    getSelection().selectAllChildren($("commands"));
    say("This browser lets no page copy here; the commands are selected");
  }),
);
$("share").addEventListener("click", () => {
  history.replaceState(null, "", `#${form.toFragment()}`);
  const size = location.href.length > 8000 ? `, ${location.href.length} characters: some programs cut it` : "";
  copy(location.href, `Link copied${size}`, () => say(`The link is in the address bar${size}`));
});

function open() {
  form.restore(location.hash.slice(1));
  form.arrange();
  attempt(learn);
}

addEventListener("hashchange", open); // another link in the same tab
open();
