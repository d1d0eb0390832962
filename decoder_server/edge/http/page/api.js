// Calls of the server: the key, errors as sentences, and the same calls as curl commands.
const KEY = "preread-api-key";
let memory = ""; // where the browser keeps nothing for this page

export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) || memory; // of this tab, until it is closed
    } catch {
      return memory;
    }
  },
  set(value) {
    memory = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // `memory` has it
    }
  },
};

export class CallFailed extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.needsKey = status === 401 || (status === 403 && code === "permission_denied");
    this.keyIsWrong = status === 401;
  }
}

export async function call(path, { method, body, lines } = {}) {
  const headers = { "content-type": lines === undefined ? "application/json" : "application/x-ndjson" };
  if (key.get()) headers.authorization = "Bearer " + key.get();
  const content = lines === undefined ? body && JSON.stringify(body) : lines;
  let response;
  try {
    response = await fetch(path, { method: method || (content === undefined ? "GET" : "POST"), headers, body: content });
  } catch {
    throw new CallFailed("The server does not answer; is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  const error = (answer && answer.error) || {};
  throw new CallFailed(error.message || `${response.status} ${response.statusText}`, response.status, error.code);
}

// One segment of a path: a collection's name, which the server checks.
export const segment = encodeURIComponent;

// For a POSIX shell. The key stays out of it: the shell has it in its environment.
export function asCurl({ path, body }) {
  const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
  const parts = ["curl -s", quoted(location.origin + path)];
  if (key.get()) parts.push('-H "authorization: Bearer $PREREAD_API_KEY"');
  if (body) parts.push("-H 'content-type: application/json' -d", quoted(JSON.stringify(body)));
  return parts.join(" ");
}
