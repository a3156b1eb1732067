"use strict";
// Everything that is shown is in data.js: fortify.examined.explorer writes it and says what it holds.
const data = window.EXPLORER;
const $ = (id) => document.getElementById(id);
const picked = (name) => document.querySelector(`input[name=${name}]:checked`);
const percent = (p) => `${Math.round(100 * p)} %`;
const best = (p) => p.indexOf(Math.max(...p));

// The bytes of one tile of a sprite.
function tile(sprite, number) {
  const side = data.size, canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const x = (number % data.columns) * side, y = Math.floor(number / data.columns) * side;
  context.drawImage(sprite, x, y, side, side, 0, 0, side, side);
  return context.getImageData(0, 0, side, side).data.filter((_, i) => i % 4 === 0);
}

// The attacked grey level (0 to 255) of a pixel in a channel, from its own and what is stored.
function attackedLevel(attack, grey, code, eps, channel) {
  if (attack === "pgd") return Math.min(255, Math.max(0, grey + (code - 1) * eps));
  const step = attack === "clamp" ? 0 : Math.floor(code / 3 ** channel) % 3 - 1;
  const z = (grey / 255 - data.mean[channel]) / data.std[channel] + data.alpha * step;
  return 255 * (Math.min(1, Math.max(0, z)) * data.std[channel] + data.mean[channel]);
}

function draw(id, words, level) {
  const canvas = $(id), context = canvas.getContext("2d");
  canvas.width = canvas.height = data.size;
  const image = context.createImageData(data.size, data.size);
  for (let i = 0; i < image.data.length; i++) image.data[i] = i % 4 === 3 ? 255 : level(i >> 2, i % 4);
  context.putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", words);
}

function drawSlices(sprites, slice, attack, now, eps) {
  const clean = tile(sprites.tiles, slice.tile), sprite = sprites[attack === "pgd" ? "changes" : "tiles"];
  const stored = "tile" in now ? tile(sprite, now.tile) : clean; // where nothing is stored it does not matter
  const level = (i, channel) => attackedLevel(attack, clean[i], stored[i], eps, channel);
  const factor = Math.max(1, Math.floor(127 / Math.max(now.linf_255, 0.5)));
  const magnified = factor > 1 ? `magnified ${factor} times` : "not magnified";
  draw("clean", slice.name, (i) => clean[i]);
  draw("change", `the change, ${magnified}`, (i, channel) => 128 + factor * (level(i, channel) - clean[i]));
  draw("attacked", `${slice.name}, attacked`, level);
  $("magnified").textContent = now.linf_255 ? `the change, ${magnified} (mid-grey: unchanged)` : "no change";
}

function bar(name, p, before, kind, note) {
  const row = document.createElement("tr");
  row.innerHTML = `<th scope="row"><small>${note}</small></th><td><div class="bar">` +
    `<i class="${kind}" style="width:${100 * p}%"></i><b style="left:${100 * before}%"></b></div></td>` +
    `<td>${percent(p)}</td>`;
  row.firstChild.prepend(name);
  return row;
}

function show(sprites) {
  const slice = data.slices[$("slice").value], truth = slice.label, classes = data.classes;
  for (const radio of document.querySelectorAll("[name=training]")) {
    radio.disabled = !(radio.value in slice.seen); // the published training is run on some seeds alone
    if (radio.disabled && radio.checked) document.querySelector("[value=normal]").checked = true;
  }
  const training = picked("training").value, attack = picked("attack").value, pgd = attack === "pgd";
  const at = pgd ? Number($("budget").value) : 0, eps = data.budgets_255[at];
  const now = slice.seen[training][attack][at], before = slice.seen[training].pgd[0].p;
  const answer = best(now.p), kind = answer === truth ? "right" : "wrong";
  $("split").textContent = $(slice.split).dataset.words;
  $("budget").disabled = !pgd;
  $("budget-shown").textContent = pgd ? `${eps} of 255 grey levels` : "this attack has none";
  $("budget").setAttribute("aria-valuetext", $("budget-shown").textContent);
  drawSlices(sprites, slice, attack, now, eps);
  $("said").className = kind;
  $("said").textContent = `The ${picked("training").dataset.network} answers ${classes[answer]} ` +
    `(${percent(now.p[answer])}). That is ${kind}: the slice is ${classes[truth]}.`;
  $("all").textContent = classes.map((name, c) => `${name} ${percent(now.p[c])}`).join(", ");
  $("bars").replaceChildren(...classes.map((name, c) =>
    bar(name, now.p[c], before[c], c === answer ? kind : "", c === truth ? "the true class" : "")));
  const largest = Number(now.linf_255.toPrecision(3));
  $("size").textContent = `Largest change of a pixel (L∞): ${largest} of 255 grey levels.`;
  const [k, n] = data.totals[slice.split][training][attack][at] || [];
  $("total").textContent = n ? `The same setting on all ${n} test slices: ${percent(k / n)} correct.` : "";
}

async function start() {
  const sprites = { tiles: new Image(), changes: new Image() };
  for (const name in sprites) await Object.assign(sprites[name], { src: data[name] }).decode();
  data.slices.forEach(({ split, label, name }, i) =>
    $(split).append(new Option(`${data.classes[label]}: ${name.replace(/^.*\/|\.\w+$/g, "")}`, i)));
  Object.assign($("budget"), { max: data.budgets_255.length - 1, value: data.budgets_255.indexOf(data.eps_255) });
  const broken = ({ label, seen: { normal } }) => normal && best(normal.pgd[0].p) === label &&
    best(normal.pgd[$("budget").value].p) !== label;
  $("slice").value = Math.max(data.slices.findIndex(broken), 0); // first one that shows what an attack does
  $("steps").textContent = data.pgd_steps;
  $("credit").textContent = `Slices: ${data.source}. ${data.credit} Results of the ${data.profile} profile.`;
  document.querySelector("form").addEventListener("input", () => show(sprites));
  show(sprites);
  $("explorer").hidden = false;
}

if (data) start(); else $("missing").hidden = false;
