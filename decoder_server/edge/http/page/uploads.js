// Throw-away collections: a small JSONL file becomes one, and a button drops it again.
import { call, segment } from "./api.js";
import { THROWAWAY } from "./form.js";
import { count } from "./numbers.js";

const MAX_BYTES = 2 << 20;
const MAX_LINES = 1000;
const MAX_REASONS = 3;

function newName() {
  const random = [...crypto.getRandomValues(new Uint8Array(4))].map((one) => one.toString(16).padStart(2, "0"));
  const [day, time] = new Date().toISOString().slice(0, 19).split("T");
  return `${THROWAWAY}${day.replaceAll("-", "")}-${time.replaceAll(":", "")}-${random.join("")}`;
}

// The new collection's name and a sentence about it; the server checks the lines, and names the first that is wrong.
export async function upload(file) {
  if (!file) throw new Error("file is absent; expected a JSONL file");
  if (file.size > MAX_BYTES) {
    throw new Error(`file is ${count(file.size, "byte")} long; expected at most ${count(MAX_BYTES, "byte")}`);
  }
  const lines = await file.text();
  const number = lines.split("\n").filter((line) => line.trim()).length;
  if (number < 1 || number > MAX_LINES) {
    throw new Error(`file has ${count(number, "line")}; expected 1 to ${MAX_LINES.toLocaleString("en")}`);
  }
  const name = newName();
  let stored;
  try {
    stored = await call(`/v1/collections/${segment(name)}/passages`, { lines });
  } catch (error) {
    await drop(name).catch(() => {}); // the lines before the wrong one
    throw error;
  }
  const reasons = stored.refused.slice(0, MAX_REASONS).map((one) => `${one.id || "a line"}: ${one.message}`);
  if (!stored.num_stored) throw new Error(`no passage of the file was stored; ${reasons.join("; ")}`);
  const refused = stored.num_refused ? `, ${stored.num_refused} rejected (${reasons.join("; ")})` : "";
  return { name, told: `${count(stored.num_stored, "passage")} stored in ${name}${refused}` };
}

export async function drop(name) {
  const dropped = await call(`/v1/collections/${segment(name)}`, { method: "DELETE" });
  return `${name} is gone (${count(dropped.num_passages, "passage")})`;
}
