// Charts below Locust's own: goodput beside the offered load, percentiles of correct answers, the server's own times.
const CHARTS = [
  ["Requests per second", [["offered", "#777777"], ["good", "#009E73", "in time (goodput)"], ["rejected", "#E69F00"], ["late", "#CC79A7"], ["failed", "#D55E00"]]],
  ["Correct answers, ms", [["p50_ms", "#56B4E9", "p50"], ["p99_ms", "#0072B2", "p99"]]],
  ["On the server, ms per request (Server-Timing)", [["queue_ms", "#E69F00", "in the queue"], ["model_ms", "#009E73", "in the model"]]],
  ["Requests per batch", [["batch_size", "#CC79A7", "batch size"]]],
];
const WIDTH = 560, HEIGHT = 150, LEFT = 44, BOTTOM = 18;

const panel = document.createElement("section");
panel.id = "goodput";
panel.hidden = true;
panel.style.cssText =
  "max-width:1200px;margin:0 auto;padding:8px 24px 32px;font:14px Roboto,sans-serif;color:#888";
document.body.append(panel);
// Locust's app is as high as the window: without this the charts were below it, where no one looks.
document.head.append(Object.assign(document.createElement("style"), { textContent: "#root > div { min-height: 0 !important }" }));

function line(points, x, y, colour) {
  let path = "", pen = "M";
  for (const [second, value] of points) {
    if (value === null) { pen = "M"; continue; }
    path += `${pen}${x(second).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  return `<path d="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`;
}

function chart([title, lines], { columns, rows }) {
  const index = (name) => columns.indexOf(name);
  const first = rows[0][0], last = Math.max(rows.at(-1)[0], first + 1);
  const values = lines.flatMap(([name]) => rows.map((row) => row[index(name)] ?? 0));
  const most = Math.max(...values, 1);
  const x = (second) => LEFT + ((WIDTH - LEFT) * (second - first)) / (last - first);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - 8) * value) / most;
  const paths = lines.map(([name, colour]) => line(rows.map((row) => [row[0], row[index(name)]]), x, y, colour));
  const legend = lines.map(([name, colour, label]) => {
    const now = rows.findLast((row) => row[index(name)] !== null)?.[index(name)];
    return `<span style="color:${colour};margin-right:12px">━ ${label ?? name} ${now === undefined ? "" : +now.toFixed(1)}</span>`;
  });
  return `<figure style="margin:0"><figcaption><b>${title}</b><br>${legend.join("")}</figcaption>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" width="100%" role="img" aria-label="${title}" fill="#888" font-size="11">
    <line x1="${LEFT}" x2="${WIDTH}" y1="${y(0)}" y2="${y(0)}" stroke="#888"/>
    <text x="${LEFT - 4}" y="${y(most) + 4}" text-anchor="end">${+most.toFixed(1)}</text>
    <text x="${LEFT - 4}" y="${y(0)}" text-anchor="end">0</text>
    <text x="${LEFT}" y="${HEIGHT - 4}">${first} s</text>
    <text x="${WIDTH}" y="${HEIGHT - 4}" text-anchor="end">${last} s</text>${paths.join("")}</svg></figure>`;
}

async function draw() {
  const reply = await fetch("./goodput").catch(() => null);
  if (!reply?.ok) return;
  const data = await reply.json();
  data.rows.pop(); // the second that has not ended: fewer were offered in it than were answered, or the other way round
  panel.hidden = data.rows.length < 2;
  if (panel.hidden) return;
  panel.innerHTML =
    `<h2 style="font-size:18px;font-weight:500">Goodput</h2><p style="margin-bottom:12px">${data.sentences.join("<br>")}</p>` +
    `<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px 32px">` +
    CHARTS.map((one) => chart(one, data)).join("") + "</div>";
}

setInterval(draw, 2000);
draw();
