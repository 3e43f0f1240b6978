"use strict";

/** What every chart is drawn with: the run's figures, and the colours of the page, light or dark. */
const data = JSON.parse(document.getElementById("data").textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const palette = number => colour(`--c${number % 8}`);
/** Lines beyond the eight colours are dashed, then dotted. */
const dash = number => [undefined, [7, 4], [2, 3]][Math.floor(number / 8) % 3];
const figure = value => value == null ? "" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(2) : String(+value.toPrecision(4));

const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
const tick = value => value == null ? "" : Math.abs(value) >= 1e4 ? compact.format(value)
  : value && Math.abs(value) < 1e-3 ? Number(value.toPrecision(3)).toExponential() : figure(value);

/** The range of a scale, with some room even where all is alike. */
const room = (_, low, high) => {
  if (low == null || (low === 0 && high === 0)) return [0, 1];
  return low === high ? [low - (Math.abs(low) || 1) / 2, low + (Math.abs(low) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true);
};
const from0 = (_, low, high) => [0, (high || 1) * 1.08];

/** Axis -> words, and the place of a row on it. */
const AXES = {
  step: {words: "iterations", of: row => row.step},
  network_rows: {words: "network rows", of: row => row.network_rows ?? (row.step === 0 ? 0 : null)},
  seconds: {words: "seconds", of: row => row.seconds},
};

const line = (words, of, more = {}) => ({words, of, ...more});
const field = (name, words = name, more = {}) => line(words, row => row[name], more);

/** One line for each place of a list, or each name of a table, that rows hold. */
const each = (name, words) => rows => {
  const keys = new Set(rows.flatMap(row => Object.keys(row[name] ?? {}).filter(key => row[name][key] != null)));
  return [...keys].map(key => line(words(key), row => row[name]?.[key]));
};

/** A held-out score by kind of prompt. */
const byKind = score => ({title: `${score} by kind of prompt (held-out)`, lines: rows =>
  [...new Set(rows.flatMap(row => Object.keys(row.kinds ?? {})))].filter(name => name.startsWith(`${score}/`))
    .map(name => line(name.slice(score.length + 1), row => row.kinds?.[name], {points: true}))});

/** The charts over the run; those without a figure are left out. */
const CHARTS = [
  {title: "Reward and gold", lines: () => [field("reward_mean", "reward (training branches)", {faint: true}),
    ...data.names.map(name => field(name, `${name} (held-out)`, {points: true}))], marks: row => row.gold_fall},
  ...data.names.map(byKind),
  {title: "Reward std among siblings, by fork step", lines: each("reward_std_per_step", key => `step ${key}`)},
  {title: "Log-ratio and clip fraction", lines: () => [field("log_ratio_mean", "mean |log ratio|"),
    field("log_ratio_max", "largest"), field("first_log_ratio_max", "largest of the first update"),
    field("clip_fraction", "clip fraction (right)", {right: true})]},
  {title: "Norm of the gradient", lines: () => [field("grad_norm", "before clipping")]},
  {title: "KL", lines: () => [field("approx_kl", "to the sampling policy"), field("kl", "to the model before training")]},
  {title: "Rewards by scorer", lines: rows => {
    const found = each("reward_means", key => key)(rows);
    return found.length > 1 ? found : [];
  }},
  {title: "Seconds by phase", lines: each("phase_seconds", key => key)},
  {title: "Groups that teach nothing", lines: () => [field("idle_share", "part of all groups")]},
  {title: "Branches an hour", lines: () => [field("rollouts_per_hour", "branches an hour")]},
];

/** A box with a heading and what a chart says in words, for those who do not see it. */
function frame(host, title, words) {
  const box = host.appendChild(document.createElement("div"));
  box.className = "chart";
  box.appendChild(document.createElement("h3")).textContent = title;
  const place = box.appendChild(document.createElement("div"));
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `${title}. ${words}`);
  return place;
}

const HEIGHT = 230;

function plot(place, options, columns) {
  const width = Math.max(place.clientWidth, 200);
  const chart = new uPlot({width, height: HEIGHT, ...options}, columns, place);
  new ResizeObserver(() => place.clientWidth && chart.setSize({width: place.clientWidth, height: HEIGHT})).observe(place);
  place.chart = chart;
  return chart;
}

const axis = (more = {}) => ({stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1},
  ticks: {stroke: colour("--line"), width: 1}, font: "11px system-ui", labelFont: "12px system-ui", labelSize: 18, size: 64,
  values: (_, marks) => marks.map(tick), ...more});
const WHOLE = Array.from({length: 30}, (_, k) => [1, 2, 5][k % 3] * 10 ** Math.floor(k / 3));  // distances of ticks
const readout = (_, value) => figure(value);

/** Dotted lines where `marks` finds something in a row, as where gold fell alone. */
function marked(spec, rows, xs) {
  const found = spec.marks ? xs.filter((_, place) => spec.marks(rows[place])) : [];
  return {draw: [chart => {
    const {ctx, bbox} = chart;
    ctx.save();
    ctx.strokeStyle = colour("--bad");
    ctx.setLineDash([3, 3]);
    for (const value of found) {
      const left = Math.round(chart.valToPos(value, "x", true));
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }]};
}

/** One chart of `CHARTS` over one of `AXES`. */
function drawOver(host, spec, over) {
  const placed = data.rows.filter(row => over.of(row) != null);
  const lines = spec.lines(placed).filter(each => placed.some(row => each.of(row) != null));
  const rows = placed.filter(row => lines.some(each => each.of(row) != null));
  if (!rows.length) return;
  const xs = rows.map(over.of), columns = lines.map(each => rows.map(row => each.of(row) ?? null));
  const said = lines.map((each, number) => {
    const known = columns[number].filter(value => value != null);
    return `${each.words} from ${figure(known[0])} to ${figure(known.at(-1))}`;
  });
  const alone = xs.length === 1;
  const series = lines.map((each, number) => ({label: each.words, stroke: palette(number), value: readout, spanGaps: true,
    dash: dash(number), width: each.faint ? 1 : 1.6, alpha: each.faint ? 0.75 : 1, scale: each.right ? "right" : "y",
    points: {show: each.points || alone, size: 6, fill: palette(number)}}));
  const right = lines.some(each => each.right) ? [axis({scale: "right", side: 1, grid: {show: false}})] : [];
  plot(frame(host, spec.title, `Over ${over.words}: ${said.join("; ")}.`), {
    series: [{label: over.words, value: readout}, ...series], axes: [axis({label: over.words, size: 30, incrs: WHOLE}), axis(), ...right],
    scales: {x: {time: false, ...(alone && {range: [xs[0] - 1, xs[0] + 1]})}, y: {range: room}, right: {range: room}},
    cursor: {sync: {key: "run", scales: ["x", null]}, drag: {x: true, y: false}}, hooks: marked(spec, rows, xs),
  }, [xs, ...columns]);
}

/** Points of (reward, gold), in the order of time where `path` says so. */
function drawScatter(host, title, points, names, path) {
  const sorted = [...points].sort((one, other) => one[0] - other[0]);
  const words = path ? `From ${figure(points[0][0])}, ${figure(points[0][1])} to ${figure(points.at(-1)[0])}, ${
    figure(points.at(-1)[1])}.` : `${points.length} prompts.`;
  const draw = chart => {
    const {ctx} = chart, at = points.map(([x, y]) => [chart.valToPos(x, "x", true), chart.valToPos(y, "y", true)]);
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = palette(0);
    ctx.beginPath();
    if (path) at.forEach(([x, y]) => ctx.lineTo(x, y));
    ctx.stroke();
    at.forEach(([x, y], place) => {
      ctx.globalAlpha = path ? 0.25 + 0.75 * (place + 1) / at.length : 0.35;
      ctx.beginPath();
      ctx.arc(x, y, 4 * devicePixelRatio, 0, 7);
      ctx.fill();
    });
    ctx.globalAlpha = 1;
    ctx.fillStyle = colour("--ink");
    ctx.font = `${11 * devicePixelRatio}px system-ui`;
    for (const place of path ? new Set([0, at.length - 1]) : []) {
      const leftHalf = at[place][0] < chart.bbox.left + chart.bbox.width / 2;
      ctx.textAlign = leftHalf ? "left" : "right";
      ctx.fillText(path[place], at[place][0] + (leftHalf ? 8 : -8) * devicePixelRatio, at[place][1] + 4 * devicePixelRatio);
    }
    ctx.restore();
  };
  plot(frame(host, title, words), {
    series: [{label: names[0], value: readout}, {label: names[1], value: readout, stroke: palette(0), paths: () => null,
      points: {show: false}}], scales: {x: {time: false, range: room}, y: {range: room}},
    axes: [axis({label: names[0], size: 30}), axis({label: names[1]})], hooks: {draw: [draw]}, cursor: {drag: {x: false}},
  }, [sorted.map(point => point[0]), sorted.map(point => point[1])]);
}

/** Standard deviation among siblings early and late in the run, beside the weight of the loss. */
function drawSpread(host) {
  const measured = data.rows.map(row => row.reward_std_per_step).filter(row => row?.some(value => value != null));
  if (!measured.length) {
    host.appendChild(document.createElement("p")).textContent = "No spread was measured: one sibling a fork.";
    return;
  }
  const third = Math.max(1, Math.floor(measured.length / 3)), steps = measured[0].map((_, step) => step);
  const mean = part => steps.map(step => {
    const known = part.map(row => row[step]).filter(value => value != null);
    return known.length ? known.reduce((sum, value) => sum + value) / known.length : null;
  });
  const columns = [mean(measured.slice(0, third)), mean(measured.slice(-third))];
  const weights = steps.map(step => data.rows[0].loss_weights?.[step] || null);
  const said = steps.map(step => `step ${step}: ${figure(columns[0][step])}, then ${figure(columns[1][step])}`);
  const bars = align => uPlot.paths.bars({size: [0.4, 60], align});
  plot(frame(host, "Reward std among siblings, and weight of the loss", `${said.join("; ")}.`), {
    series: [{label: "fork step", value: readout},
      {label: "reward std, first third", fill: palette(0), stroke: palette(0), paths: bars(-1), points: {show: false}, value: readout},
      {label: "last third", fill: palette(0) + "77", stroke: palette(0), paths: bars(1), points: {show: false}, value: readout},
      {label: "weight of the policy loss (right)", stroke: palette(1), scale: "right", dash: [4, 4], spanGaps: true,
        points: {show: true, size: 7, fill: palette(1)}, value: readout}],
    axes: [axis({label: "fork step", size: 30, incrs: WHOLE}), axis(), axis({scale: "right", side: 1, grid: {show: false}})],
    scales: {x: {time: false, range: [-0.6, steps.length - 0.4]}, y: {range: from0}, right: {range: from0}}, cursor: {drag: {x: false}},
  }, [steps, ...columns, weights]);
}
