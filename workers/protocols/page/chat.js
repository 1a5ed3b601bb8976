const POLL_MS = 250, QUIET_POLL_MS = 1000;
const SHOWN_S = 10, LEAST_PX = 2, MOST_PX = 7, LANE_PX = 9, FILL_PX = 64, GAP_PX = 8;  // of the picture
const MOST_STEPS = 400, MOST_LANES = 48;
const SAMPLING = {  // OpenAI's name -> what is shown, the step of the field
  temperature: ["Temperature", 0.1], top_p: ["Top p", 0.05], top_k: ["Top k", 1], min_p: ["Min p", 0.05], max_tokens: ["Most tokens", 1], seed: ["Seed", 1],
  repetition_penalty: ["Repetition penalty", 0.1], presence_penalty: ["Presence penalty", 0.1], frequency_penalty: ["Frequency penalty", 0.1], stop: ["Stop text", ""],
};
const VLLMS = ["top_k", "min_p", "repetition_penalty"];  // not OpenAI's: its client sends them as extra_body
let info = null, upS = 0, last = null, polls = [];
let messages = [], running = null, loads = new Set();

// --- the form ---
for (const [name, [label, step]] of Object.entries(SAMPLING)) {
  const field = make("input", {id: "with-" + name, ...(step ? {type: "number", step: "any"} : {type: "text"})});
  $("sampling").append(make("div", {}, make("label", {for: "with-" + name}, label), field));
}
function sampling() {
  const given = {};
  for (const [name, [label, step]] of Object.entries(SAMPLING)) {
    const field = $("with-" + name), text = field.value;
    if (!field.reportValidity()) throw new Error(label + " must be a number.");
    if (text !== "") given[name] = step ? Number(text) : text;
  }
  return given;
}
const pathOf = () => info.has_chat ? "v1/chat/completions" : "v1/completions";
function bodyOf(text) {
  const given = sampling(), system = $("system").value.trim();
  if (!info.has_chat) return {prompt: text, max_tokens: 128, stream: true, ...given};
  const first = system ? [{role: "system", content: system}] : [];
  return {messages: [...first, ...messages, {role: "user", content: text}], stream: true, ...given};
}
function showSame(content) {
  const hasKey = Boolean($("key").value), url = location.origin + ROOT, {stream, ...rest} = content;
  $("curl").textContent = "curl -N -H 'Content-Type: application/json'" + (hasKey ? ' -H "x-api-key: $API_KEY"' : "") +
    " " + url + pathOf() + " \\\n  -d '" + JSON.stringify(content).replaceAll("'", "'\\''") + "'";
  const extra = Object.fromEntries(VLLMS.filter(name => name in rest).map(name => [name, rest[name]]));
  const own = Object.entries(rest).filter(([name]) => !(name in extra)).map(([name, value]) => name + "=" + python(value));
  if (Object.keys(extra).length) own.push("extra_body=" + python(extra));
  const key = hasKey ? 'os.environ["API_KEY"]' : '"none"';
  const [method, delta] = info.has_chat ? ["chat.completions", "delta.content or \"\""] : ["completions", "text"];
  $("python").textContent = "import " + (hasKey ? "os, " : "") + "openai\n\nclient = openai.OpenAI(base_url=\"" + url + "v1\", api_key=" + key + ")\n" +
    "stream = client." + method + ".create(model=\"any\", stream=True, " + own.join(", ") + ")\n" +
    "for chunk in stream:\n    print(chunk.choices[0]." + delta + ", end=\"\")";
  $("same").hidden = false;
}

// --- a chat ---
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}
async function post(path, content, signal) {
  const reply = await fetch(ROOT + path, {method: "POST", headers: keyed({"Content-Type": "application/json"}), body: JSON.stringify(content), signal});
  if (reply.ok) return reply;
  if (reply.status === 401) needKey();
  const said = await reply.json().catch(() => ({})), retry = reply.headers.get("retry-after");
  throw new Error("The server says " + reply.status + ": " + ((said.error || {}).message || said.error) + (retry ? " (" + retry + " s)" : ""));
}
function add(role, text) {
  const note = make("small", {}), body = make("span", {}, text), box = make("div", {class: "message " + role}, body, note);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return {box, body, note};
}
function told(shown, text) {
  shown.box.classList.add("notice");
  shown.note.textContent = text;
}
async function ask(event) {
  if (event) event.preventDefault();
  const text = $("prompt").value;
  if (!info || running || !text.trim()) return;
  let content;
  try { content = bodyOf(text); } catch (problem) { return told(add("assistant", ""), problem.message); }
  add("user", text);
  showSame(content);
  $("prompt").value = "";
  await write(text, content, add("assistant", ""));
  $("prompt").focus();
}
async function write(text, content, shown) {
  running = new AbortController();
  $("send").disabled = true; $("stop").disabled = false; $("log").setAttribute("aria-busy", "true");
  let answer = "", end = null;
  try {
    for await (const one of events(await post(pathOf(), content, running.signal))) {
      if (one.error) throw new Error(one.error.message);
      const [choice] = one.choices;
      answer += choice.delta ? choice.delta.content : choice.text;
      shown.body.textContent = answer;
      $("log").scrollTop = $("log").scrollHeight;
      if (choice.finish_reason) end = {reason: choice.finish_reason, ...one.timings};
    }
    if (!end) throw new Error("The answer has no end: the connection was closed.");
    shown.note.textContent = "first token " + ms(end.time_to_first_token_ms) + ", then " + ms(end.time_per_output_token_ms) + " per token; ended by " + end.reason;
  } catch (problem) {
    if (running.signal.aborted) shown.note.textContent = "stopped";
    else told(shown, problem instanceof TypeError ? "The server does not answer; is it running?" : problem.message);
  } finally {
    if (answer && info.has_chat) messages.push({role: "user", content: text}, {role: "assistant", content: answer});
    running = null;
    $("send").disabled = false; $("stop").disabled = true; $("log").setAttribute("aria-busy", "false");
  }
}
function stop() { if (running) running.abort(); }

// --- load: four requests of prompts each, as a browser keeps six connections to a server ---
const WORDS = "the old house on the hill looks over a river and a long road to the town where ".split(" ");
const LENGTHS = [4, 12, 40, 120, 6, 20, 64, 200], TOKENS = [24, 48, 80, 120];
function promptOf(number) {
  const most = Math.floor(info.limits.MAX_TOKENS / 3), n = Math.min(LENGTHS[number % LENGTHS.length], most);
  return "Story " + (number + 1) + ": " + Array.from({length: n}, (_, i) => WORDS[(i + number) % WORDS.length]).join(" ");
}
function sendLoad(n) {
  const groups = TOKENS.map(() => []);
  for (let number = 0; number < n; number++) groups[number % groups.length].push(promptOf(number));
  groups.forEach((prompt, i) => { if (prompt.length) sendGroup(prompt, Math.min(TOKENS[i], Math.floor(info.limits.MAX_TOKENS / 3))); });
}
async function sendGroup(prompt, max_tokens) {
  const abort = new AbortController();
  loads.add(abort);
  sayLoad();
  try {
    const reply = await (await post("v1/completions", {prompt, max_tokens, temperature: 1}, abort.signal)).json();
    counts.answered += reply.choices.length;
  } catch (problem) {
    if (abort.signal.aborted) counts.cancelled += prompt.length;
    else { counts.rejected += prompt.length; counts.why = problem.message; }
  }
  loads.delete(abort);
  sayLoad();
}
let counts = {answered: 0, cancelled: 0, rejected: 0, why: ""};
function sayLoad() {
  $("cancel").disabled = !loads.size;
  const parts = [counts.answered + " answered"];
  if (counts.cancelled) parts.push(counts.cancelled + " cancelled");
  if (counts.rejected) parts.push(counts.rejected + " rejected");
  $("sent").textContent = parts.join(", ") + "." + (counts.why ? " " + counts.why : "");
}

// --- the picture ---
let steps = [], ends = {}, born = {}, seenStep = 0;
function take(now) {
  for (const step of now.steps) {
    if (step.n <= seenStep) continue;
    seenStep = step.n;
    for (const [, sequence] of step.rows) born[sequence] = born[sequence] || step.n;
    steps.push(step);
  }
  for (const [sequence, reason, after] of now.ended) ends[sequence] = {reason, after};
  steps = steps.slice(-MOST_STEPS);
  if (!steps.length) return;
  for (const one of Object.keys(ends)) if (ends[one].after < steps[0].n) { delete ends[one]; delete born[one]; }
}
function lanesOf(now) {
  const used = new Set([...Object.keys(now.lengths).map(Number), ...steps.flatMap(step => step.rows.map(([slot]) => slot))]);
  return Math.min(MOST_LANES, Math.max(8, ...[...used].map(slot => slot + 1)));
}
function widthOf(room) {  // of a step, in pixels: the last SHOWN_S of work fit, where they can
  let n = 0;
  for (let s = 0; n < steps.length && s < SHOWN_S; n++) s += steps[steps.length - 1 - n].s;
  return Math.max(LEAST_PX, Math.min(MOST_PX, Math.floor(room / Math.max(1, n))));
}
function draw(now) {
  const canvas = $("engine"), width = canvas.clientWidth, lanes = lanesOf(now), height = lanes * LANE_PX + 2 * GAP_PX;
  const scale = window.devicePixelRatio || 1, colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  canvas.width = width * scale; canvas.height = height * scale; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const right = width - FILL_PX - GAP_PX, colours = {prompt: colour("amber"), token: colour("blue"), ended: colour("grey"), bad: colour("red"), line: colour("line")};
  pen.fillStyle = colours.line;
  for (let lane = 0; lane < lanes; lane++) pen.fillRect(GAP_PX, GAP_PX + lane * LANE_PX + LANE_PX - 1, width - 2 * GAP_PX, .5);
  const wide = widthOf(right - GAP_PX), shown = steps.slice(-Math.floor((right - GAP_PX) / wide));
  shown.forEach((step, i) => drawStep(pen, step, right - (shown.length - i) * wide, wide, lanes, colours));
  for (const [slot, cached] of Object.entries(now.lengths)) {
    if (slot >= lanes) continue;
    pen.fillStyle = colours.line;
    pen.fillRect(right + GAP_PX, GAP_PX + slot * LANE_PX, FILL_PX - GAP_PX, LANE_PX - 3);
    pen.fillStyle = colours.token;
    pen.fillRect(right + GAP_PX, GAP_PX + slot * LANE_PX, (FILL_PX - GAP_PX) * cached / now.capacity, LANE_PX - 3);
  }
}
function drawStep(pen, step, x, wide, lanes, colours) {
  for (const [slot, sequence, tokens, isPrompt] of step.rows) {
    if (slot >= lanes) continue;
    const y = GAP_PX + slot * LANE_PX, tall = LANE_PX - 3, gap = wide > 4 ? 1 : 0, joined = born[sequence] === step.n ? 2 * gap : 0, end = ends[sequence];
    pen.fillStyle = isPrompt ? colours.prompt : colours.token;
    const part = isPrompt ? Math.max(.5, Math.min(1, tokens / 64)) : 1;
    pen.fillRect(x + joined, y + tall * (1 - part), wide - joined - (isPrompt ? 0 : gap), tall * part);
    if (end && end.after === step.n) {
      pen.fillStyle = end.reason === "stop" || end.reason === "length" ? colours.ended : colours.bad;
      pen.fillRect(x + wide - 3, y - 1, 3, tall + 2);
    }
  }
}
const perSecond = (now, before, span, kind) => span ? Math.round((now.tokens[kind] - before.tokens[kind]) / span) : 0;
function show(live) {
  const now = live.generation, at = performance.now() / 1000;
  polls = [...polls.filter(one => one.at > at - 2), {at, tokens: now.tokens}];
  const before = polls[0], span = at - before.at, cached = Object.values(now.lengths).reduce((sum, n) => sum + n, 0), room = now.slots * now.capacity;
  $("rate").textContent = perSecond(now, before, span, "generated");
  $("prompt-rate").textContent = perSecond(now, before, span, "prompt");
  $("reused").textContent = now.tokens.reused + " reused so far";
  $("running").textContent = live.running;
  $("slots").textContent = "of " + now.slots + " slots";
  $("depth").textContent = live.depth;
  $("waiting-tokens").textContent = now.waiting_tokens + " tokens";
  $("cache").textContent = (room ? 100 * cached / room : 0).toFixed(1) + " %";
  $("cached").textContent = cached + " of " + room + " tokens";
  $("fill").value = room ? cached / room : 0;
  $("wasted").textContent = now.tokens.wasted;
  take(now);
  draw(now);
  const newest = steps.at(-1);
  if (newest) $("engine-said").textContent = "Step " + newest.n + ": " + newest.rows.filter(row => !row[3]).length + " tokens, " +
    newest.rows.filter(row => row[3]).reduce((sum, row) => sum + row[2], 0) + " tokens of prompts, " + ms(newest.s * 1000) + ".";
}
function forget() {
  polls = []; steps = []; ends = {}; born = {}; seenStep = 0;
  counts = {answered: 0, cancelled: 0, rejected: 0, why: ""};
  newChat();
  sayLoad();
}
function newChat() { stop(); messages = []; $("log").replaceChildren(); }
async function start() {
  info = await get("info");
  $("name").textContent = info.model.name;
  document.title = info.model.name + ", one queue";
  $("what").textContent = "Takes " + info.takes + "; returns the text that follows it, token by token.";
  const chips = [info.task, info.dtype, info.device, info.model.revision && "revision " + info.model.revision.slice(0, 8), info.limits.MAX_TOKENS + " tokens of context", "version " + info.version];
  $("chips").replaceChildren(...chips.filter(Boolean).map(text => make("li", {}, text)));
  $("prompt-label").textContent = info.has_chat ? "Message" : "Prompt: this model has no chat template, it continues a text";
  $("system-field").hidden = !info.has_chat;
  $("new").hidden = !info.has_chat;
  $("hint").textContent = info.settings.WEB_CONCURRENCY > 1 ? "There are " + info.settings.WEB_CONCURRENCY + " workers, each with its own engine: this page shows the one that answers it." : "";
  $("send").disabled = false;
}
async function poll() {
  let isQuiet = false;
  try {
    if (!document.hidden) {
      const now = await get("live?after=" + seenStep);
      if (!info || (last === now.worker && now.up_s < upS) || (last !== now.worker && now.workers === 1)) {
        info = null;  // another server than before
        if (now.unready) throw Object.assign(new Error(now.unready), {isCalm: now.is_loading});
        forget();
        await start();
      }
      last = now.worker; upS = now.up_s;
      tell(now.unready, now.is_loading);
      show(now);
      isQuiet = !now.running && !now.depth && !running && !loads.size;
    }
  } catch (problem) {
    const text = problem instanceof TypeError ? "The server does not answer. This page tries again by itself." : problem.message;
    tell(problem.isCalm ? "The model is loading. This page goes on by itself." : text, problem.isCalm);
  }
  setTimeout(poll, isQuiet ? QUIET_POLL_MS : POLL_MS);
}
$("key").value = sessionStorage.getItem("key") || "";
$("key").onchange = () => sessionStorage.setItem("key", $("key").value);
$("form").onsubmit = ask;
$("prompt").onkeydown = event => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event); };
document.onkeydown = event => { if (event.key === "Escape") stop(); };
$("stop").onclick = stop;
$("new").onclick = newChat;
$("cancel").onclick = () => loads.forEach(one => one.abort());
for (const button of document.querySelectorAll("[data-n]")) button.onclick = () => { if (info) sendLoad(Number(button.dataset.n)); };
poll();
