const $ = id => document.getElementById(id);
// The server's own root, also behind a proxy's path prefix: /, /docs, /prefix, /prefix/ and /prefix/docs all show this page.
const ROOT = location.pathname.replace(/\/docs\/?$/, "/").replace(/\/?$/, "/");
for (const link of document.querySelectorAll("#links a")) link.href = ROOT + link.getAttribute("href");
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const ms = value => value >= 1000 ? (value / 1000).toFixed(2) + " s" : value.toFixed(value < 10 ? 2 : 0) + " ms";
function keyed(headers = {}) {
  const key = $("key").value;
  return key ? {...headers, "x-api-key": key} : headers;
}
function tell(text, isCalm) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
  $("banner").classList.toggle("calm", Boolean(isCalm));
}
function needKey() {
  $("key-field").hidden = false;
  if (!$("key").value) $("key").focus();
}
async function get(path) {
  const reply = await fetch(ROOT + path, {headers: keyed()});
  if (reply.status === 401) needKey();
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply.json();
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return "[" + value.map(python).join(", ") + "]";
  if (typeof value === "object") return "{" + Object.entries(value).map(([k, v]) => JSON.stringify(k) + ": " + python(v)).join(", ") + "}";
  return JSON.stringify(value);
}
