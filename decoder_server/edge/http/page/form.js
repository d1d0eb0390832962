// The form: what the server offers, what is asked for, and both in the address of the page.
import { call, segment } from "./api.js";
import { $, make } from "./dom.js";
import { count } from "./numbers.js";

const RATIOS = [1, 2, 4, 8, 16, 32];
const MOST = 16; // passages that /v1/explain takes
export const THROWAWAY = "throwaway-";
// Of the address; no key is among them.
const FIELDS = [
  "query", "instruction", "model", "beside", "collection", "by", "words", "ids", "count", "ratio", "passages",
];
const OFFERED = ["model", "beside", "collection", "ratio"]; // chosen from what the server has

const collections = new Map(); // by name, as the server describes them
let models = []; // likewise
let awaited = {}; // of an address: choices that the server has not offered yet
const initial = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));

export const isLearned = () => models.length > 0;
export const value = (name) => $(name).value;
const readsStates = (model) => Boolean(model && model.fingerprint);
const chosenModels = () => {
  const first = models.find((one) => one.id === value("model"));
  const second = models.find((one) => one.id === value("beside"));
  return [first, second !== first && second].filter(Boolean);
};

function offer(name, options) {
  const wanted = awaited[name] ?? value(name);
  const isOffered = options.some(([one]) => one === wanted);
  // A choice that came with the address stays in the form; the server says what is wrong with it.
  const all = wanted && !isOffered && name in awaited ? [...options, [wanted, `${wanted} (not offered here)`]] : options;
  delete awaited[name];
  $(name).replaceChildren(...all.map(([one, text]) => Object.assign(make("option", "", text), { value: one })));
  if (all.some(([one]) => one === wanted)) $(name).value = wanted;
}

// Models and collections, as the caller's key may see them.
export async function learn() {
  models = (await call("/v1/models")).data;
  if (!models.length) throw new Error("the server is still loading its models");
  const kind = (one) => (readsStates(one) ? "states" : "text");
  offer("model", models.map((one) => [one.id, `${one.id} (reads ${kind(one)})`]));
  offer("beside", [["", "none"], ...models.map((one) => [one.id, `${one.id} (reads ${kind(one)})`])]);
  const facts = models.map((one) => `${one.id}, ${one.dtype} on ${one.device}`);
  $("about").textContent = facts.join("; ");
  await learnCollections();
}

export async function learnCollections() {
  collections.clear();
  for (const one of (await call("/v1/collections")).data) {
    for (const name of [one.id, ...one.aliases]) collections.set(name, one);
  }
  const names = [...collections].map(([name, one]) => {
    const told = [count(one.num_passages, "passage"), `ratio ${one.compression_ratio}`];
    if (name !== one.id) told.unshift(`alias of ${one.id}`);
    if (name.startsWith(THROWAWAY)) told.unshift("throw-away");
    return [name, `${name} (${told.join(", ")})`];
  });
  offer("collection", [["", "the box below"], ...names]);
  arrange();
}

// After a choice: shows the fields that it needs, and offers the ratios that the collection has.
export function arrange() {
  const name = value("collection");
  const collection = collections.get(name);
  const by = name ? value("by") : "";
  for (const [id, shown] of [
    ["texts", !name], ["way", name], ["searched", by === "words"], ["named", by === "ids"],
    ["many", by === "words" || by === "first"], ["drop", name.startsWith(THROWAWAY)],
    ["two", models.length > 1], ["finer", chosenModels().some(readsStates)],
  ]) {
    $(id).hidden = !shown;
  }
  const finest = collection ? collection.compression_ratio : 1;
  const offered = RATIOS.filter((ratio) => ratio % finest === 0);
  if (!offered.length) offered.push(finest);
  offer("ratio", offered.map((ratio) => [String(ratio), String(ratio)]));
}

// Makes a choice as soon as the server offers it.
export function choose(name, one) {
  awaited[name] = one;
}

// The state of the form as the fragment of an address, which no server sees; fields as they were at first are left out.
export function toFragment() {
  const state = new URLSearchParams();
  for (const name of FIELDS) if (value(name) !== initial[name]) state.set(name, value(name));
  return state.toString();
}

// Fills the form from such a fragment; `learn` makes the choices that the server offers.
export function restore(fragment) {
  const state = new URLSearchParams(fragment);
  for (const name of FIELDS) {
    const one = state.get(name) ?? initial[name];
    if (OFFERED.includes(name)) choose(name, one);
    else $(name).value = one;
    if (name === "by" && !$("by").value) $("by").value = initial.by; // no way of this page
  }
}

// The call that finds passages in a collection; null where they are named.
export function findingCall() {
  const name = value("collection");
  if (!name || value("by") === "ids") return null;
  const number = Number(value("count"));
  if (!Number.isInteger(number) || number < 1 || number > MOST) {
    throw new Error(`how many is '${value("count")}'; expected 1 to ${MOST}`);
  }
  const path = `/v1/collections/${segment(name)}`;
  const words = value("words").trim() || value("query");
  if (value("by") === "words") return { path: `${path}/search`, body: { query: words, top_n: number } };
  return { path: `${path}/passages?page_size=${number}`, number };
}

// The calls that rank, one for each model; passages that are found have no ids yet.
export function rankingCalls() {
  const collection = value("collection");
  const body = { query: value("query") };
  if (value("instruction").trim()) body.instruction = value("instruction");
  if (collection) {
    body.collection = collection;
    body.passage_ids = value("ids").split(/\s+/).filter(Boolean);
  } else {
    body.documents = value("passages").split("\n").filter((line) => line.trim());
  }
  return chosenModels().map((model) => {
    if (!readsStates(model)) {
      const more = { model: model.id, return_documents: true, return_margins: true };
      return { model, path: "/v1/rerank", body: { ...body, ...more } };
    }
    const ratio = Number(value("ratio"));
    return { model, ratio, path: "/v1/explain", body: { ...body, model: model.id, compression_ratio: ratio } };
  });
}
