// What the server is asked. Every drawing is a job: posted, watched by server-sent events, cancelled by DELETE.

const TOKEN = "raphael.token";
const PATIENCE = 6; // refusals for a full queue before the person is told
const POLL_MS = 500; // where the stream of events breaks off

/** An answer that is no success: RFC 9457's problem, or what could be told of another. `field` names the culprit. */
export class Problem extends Error {
  constructor(status, body = {}) {
    super(body.detail || body.title || `The server answered ${status}.`);
    this.status = status;
    this.field = typeof body.field === "string" ? body.field : null;
  }
}

let typedToken = null; // where the browser keeps nothing for a tab
let askToken = () => null; // set by the page: a promise of the token that a person types, or null

export function onTokenNeeded(ask) {
  askToken = ask;
}

export function models() {
  return request("GET", "v1/models").then((answer) => answer.json());
}

/**
 * Runs a job to its end and resolves with its result.
 *
 * path: "v1/images", "v1/edits/<kind>", "v1/inside". watch, each of it optional: {queued(job), step(job),
 * waiting(seconds), warned(texts)}.
 * signal: aborts the job, here and on the server; then it rejects with an AbortError. Rejects with a Problem.
 */
export async function run(path, body, { signal, watch = {} } = {}) {
  signal?.throwIfAborted();
  const posted = await postWithPatience(`${path}?wait=false`, body, signal, watch);
  if (posted.status !== 202) return posted.json(); // a server that answers at once
  const job = await posted.json();
  const cancel = () => request("DELETE", `v1/jobs/${encodeURIComponent(job.id)}`).catch(() => {});
  if (signal?.aborted) cancel();
  signal?.throwIfAborted();
  signal?.addEventListener("abort", cancel, { once: true });
  try {
    watch.queued?.(job);
    const result = finished(await lastState(job.id, signal, watch));
    if (result.warnings?.length) watch.warned?.(result.warnings);
    return result;
  } finally {
    signal?.removeEventListener("abort", cancel);
  }
}

/** Of a job's last state, its result. */
function finished(job) {
  if (job.state === "done") return job.result;
  if (job.state === "cancelled") throw new DOMException("The job was cancelled.", "AbortError");
  throw new Problem(job.error?.status ?? 500, job.error ?? { detail: "The job failed and did not say why." });
}

async function lastState(id, signal, watch) {
  const path = `v1/jobs/${encodeURIComponent(id)}`;
  try {
    const stream = await request("GET", `${path}/events`, { signal, accept: "text/event-stream" });
    for await (const { event, data } of eventsOf(stream.body)) {
      const job = { state: event, ...JSON.parse(data) };
      if (["done", "failed", "cancelled"].includes(event)) return { ...job, state: event };
      tell(event, job, watch);
    }
  } catch (error) {
    const refused = error instanceof Problem && error.status !== 429; // 429: too many watch, but asking is free
    if (signal?.aborted || refused) throw error;
  }
  for (;;) {
    signal?.throwIfAborted(); // the stream ended early: ask again and again
    const job = await (await request("GET", path, { signal })).json();
    if (["done", "failed", "cancelled"].includes(job.state)) return job;
    tell(job.state === "queued" ? "queued" : "step", job, watch);
    await pause(POLL_MS, signal);
  }
}

function tell(event, job, watch) {
  if (event === "queued") watch.queued?.(job);
  else watch.step?.(job);
}

/** Server-sent events of a body, one after the other: {event, data}. Comments, ids and retry times are passed over. */
export async function* eventsOf(body) {
  let kept = "";
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      kept = (kept + decoder.decode(value, { stream: true })).replaceAll("\r\n", "\n");
      const blocks = kept.split("\n\n");
      kept = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(block) {
  const found = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const name = line.slice(0, colon);
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (name === "event") found.event = value;
    if (name === "data") found.data += found.data ? `\n${value}` : value;
  }
  return found;
}

async function postWithPatience(path, body, signal, watch) {
  for (let refused = 1; ; refused += 1) {
    try {
      return await request("POST", path, { body });
    } catch (problem) {
      if (problem.status !== 429 || refused === PATIENCE) throw problem;
      watch.waiting?.(problem.retryAfter);
      await pause(problem.retryAfter * 1000, signal);
    }
  }
}

async function request(method, path, { body, signal, accept = "application/json" } = {}) {
  for (;;) {
    const token = storedToken();
    const headers = { Accept: accept, ...(token && { Authorization: `Bearer ${token}` }) };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const sent = { method, headers, signal, credentials: "omit", cache: "no-store" };
    const answer = await fetch(path, { ...sent, body: body === undefined ? undefined : JSON.stringify(body) }).catch(
      unanswered,
    );
    if (answer.ok) return answer;
    const problem = new Problem(answer.status, await answer.json().catch(() => ({})));
    problem.retryAfter = Math.min(30, Math.max(1, Number(answer.headers.get("Retry-After")) || 1));
    if (answer.status !== 401) throw problem;
    const typed = await askToken(token !== null);
    if (!typed) throw problem;
    storeToken(typed);
  }
}

function storedToken() {
  try {
    return sessionStorage.getItem(TOKEN) ?? typedToken;
  } catch {
    return typedToken;
  }
}

function storeToken(token) {
  typedToken = token;
  try {
    sessionStorage.setItem(TOKEN, token);
  } catch {
    // it is asked for again after a reload
  }
}

function unanswered(error) {
  if (error.name === "AbortError") throw error;
  throw new Problem(0, { detail: "The server does not answer. Is it still running?" });
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
