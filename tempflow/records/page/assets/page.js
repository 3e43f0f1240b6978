"use strict";

/** The scores that can be set against the reward: golds. */
const golds = data.names.filter(name => name.startsWith("gold"));
const pairs = (rows, of, name) => rows.map(row => [of(row, "reward_test"), of(row, name)]);
const known = points => points.every(value => value != null);

function drawCurves() {
  const host = document.getElementById("charts"), over = AXES[document.querySelector("input[name=axis]:checked").value];
  host.replaceChildren();
  for (const spec of CHARTS) drawOver(host, spec, over);
  if (!host.children.length) host.textContent = "No iteration has ended yet.";
}

function drawGold() {
  const host = document.getElementById("scatters"), name = document.getElementById("gold-name")?.value ?? golds[0];
  host.replaceChildren();
  const rows = data.rows.filter(row => known([row.reward_test, row[name]]));
  if (!name || !rows.length) {
    host.textContent = "No gold score was watched in this run.";
    return;
  }
  const points = pairs(rows, (row, key) => row[key], name), names = ["reward_test", name];
  drawScatter(host, "Evaluations, in their order", points, names, rows.map(row => `iteration ${row.step}`));
  const [rewards, scores] = names.map(key => data.scores[key] ?? []);
  const prompts = rewards.map((reward, place) => [reward, scores[place]]).filter(known);
  if (prompts.length) drawScatter(host, "Prompts, at the last evaluation", prompts, names);
}

function chooseGold() {
  if (golds.length < 2) return;
  const label = document.getElementById("which").appendChild(document.createElement("label"));
  const choice = document.createElement("select");
  choice.id = "gold-name";
  for (const name of golds) choice.add(new Option(name));
  choice.addEventListener("change", drawGold);
  label.append("gold", choice);
}

function drawForks() {
  const host = document.getElementById("spread");
  host.replaceChildren();
  drawSpread(host);
}

function drawAll() {
  drawCurves();
  drawGold();
  drawForks();
}

chooseGold();
drawAll();
document.getElementById("axis").addEventListener("change", drawCurves);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.addEventListener("DOMContentLoaded", () => {
  if (steps.length) {
    showPairs();
    showGallery();
  }
  document.documentElement.dataset.ready = Math.round(performance.now());
});
