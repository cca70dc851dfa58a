"""The style sheet of report.html: light, dark, narrow and paper. ASCII, and nothing that is loaded from elsewhere."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #15191f; --soft: #525c69; --line: #dde1e7; --track: #e9ecf1;
  --dense: #808b9a; --pruned: #0b7a75; --good: #0b6b3a; --bad: #b3261e; --wash: #e6f4f1; --warn: #fff4dc; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1318; --card: #181e26; --text: #e8ecf1; --soft: #a3aebc; --line: #2c3541; --track: #26303c;
  --dense: #77828f; --pruned: #2fb8ac; --good: #58cf8d; --bad: #ff8a80; --wash: #12302e; --warn: #3a2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
header p { margin: 0; color: var(--soft); }
h1 { font-size: clamp(1.6rem, 5vw, 2.6rem); line-height: 1.15; margin: 6px 0 10px;
  letter-spacing: -.02em; text-wrap: balance; }
h1 small { display: block; color: var(--soft); font-size: 1rem; font-weight: 400; letter-spacing: 0; margin-top: 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 4px; }
h3 { font-size: .95rem; margin: 18px 0 6px; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
section p { color: var(--soft); }
section, .verdict, .notes { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 16px; }
.verdict { border-left: 5px solid var(--pruned); background: var(--wash); }
.verdict.caution { border-left-color: var(--bad); background: var(--warn); }
.verdict p { margin: 0; }
.notes { border-left: 5px solid #c58a00; background: var(--warn); }
.notes ul { margin: 0; padding-left: 18px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 18px 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; }
.tiles dd.value { font-size: 1.5rem; font-weight: 650; line-height: 1.3; }
.tiles dd.detail { color: var(--soft); font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; background: /* a shadow at an edge that hides something */
  linear-gradient(90deg, var(--card) 40%, transparent) 0 0 / 36px 100% no-repeat local,
  linear-gradient(-90deg, var(--card) 40%, transparent) 100% 0 / 36px 100% no-repeat local,
  linear-gradient(90deg, #8888, transparent) 0 0 / 10px 100% no-repeat scroll,
  linear-gradient(-90deg, #8888, transparent) 100% 0 / 10px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding: 2px 0 6px; }
th, td { padding: 6px 10px 6px 0; text-align: left; vertical-align: middle; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-size: .8rem; font-weight: 600; padding-bottom: 4px; }
tbody th { font-weight: 500; } .numbers td { white-space: nowrap; }
td small, th small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem; }
.compare td:nth-child(n+3), .compare th:nth-child(n+3), .numbers td, .numbers thead th:not(:first-child) {
  text-align: right; }
.compare td:nth-child(2) { width: 42%; } .stages td:nth-child(2) { width: 55%; }
.compare td:last-child, .numbers td:last-child, .compare th:last-child, .numbers th:last-child { padding-right: 0; }
.facts th { width: 36%; color: var(--soft); font-weight: 400; }
.facts th, .facts td, .reasons td { overflow-wrap: anywhere; vertical-align: top; }
.choices td { white-space: nowrap; } .choices td:last-child { white-space: normal; overflow-wrap: anywhere; }
.facts thead, .sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
svg { display: block; width: 100%; }
svg.wide { min-width: 560px; }
svg.of1 { height: 12px; } svg.of2 { height: 24px; } svg.thin { height: 9px; }
.track { fill: var(--track); } .dense { fill: var(--dense); } .pruned { fill: var(--pruned); }
.pale { opacity: .4; }
.interval { stroke: var(--text); stroke-width: 1.5; fill: none; vector-effect: non-scaling-stroke; }
.legend { display: flex; gap: 18px; flex-wrap: wrap; font-size: .85rem; color: var(--soft); margin: 2px 0 8px; }
.legend svg { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
.widths { list-style: none; margin: 8px 0 0; padding: 0; columns: 300px 3; column-gap: 28px; font-size: .8rem; }
.widths li { display: grid; grid-template-columns: minmax(0, 1fr) 60px 84px;
  gap: 8px; align-items: center; break-inside: avoid; padding: 2px 0; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.widths span { overflow-wrap: anywhere; } .widths b { font-weight: 500; text-align: right; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 32px; }
.two > * { min-width: 0; }
.long { max-height: 12rem; overflow: auto; overflow-wrap: anywhere; color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 12px;
  margin: 8px 0; }
.plot { width: 100%; max-width: 480px; background: #fff; border-radius: 8px; }
pre { background: var(--track); border-radius: 8px; padding: 12px 14px; margin: 8px 0;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
article { border-top: 1px solid var(--line); margin-top: 14px; }
article table { max-width: 560px; font-size: .85rem; }
article tbody th, article td { padding-top: 2px; padding-bottom: 2px; }
.scroll + p { margin-top: 12px; } .scroll + .scroll { margin-top: 18px; }
.maps { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 4px 0 10px; }
.maps figure { margin: 0; min-width: 0; }
.maps img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  background: #fff; }
.maps figcaption { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.maps.lines { grid-template-columns: 1fr; gap: 14px; } .maps.lines img { image-rendering: auto; }
.alike td:nth-child(2) { width: 22%; }
.alike td:nth-child(n+3), .alike th:nth-child(n+3) { text-align: right; }
footer { color: var(--soft); font-size: .85rem; margin-top: 20px; }
:focus-visible { outline: 2px solid var(--pruned); outline-offset: 2px; }
@media (max-width: 720px) {
  main { padding: 20px 12px 40px; } section, .verdict, .notes { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; } .two { grid-template-columns: 1fr; }
  th, td { padding-right: 8px; } .compare { font-size: .85rem; } .numbers { font-size: .78rem; }
  .tiles dd.value { font-size: 1.15rem; } caption { max-width: calc(100vw - 56px); }
  .tiles div { padding: 10px 12px; }
  .maps { grid-template-columns: repeat(3, 1fr); }
  .alike { font-size: .8rem; } .alike th, .alike td { padding-right: 5px; }
  .alike td:nth-child(2), .alike th:nth-child(2), .alike td:nth-child(n+8), .alike th:nth-child(n+8) { display: none; }
  article tbody th { overflow-wrap: anywhere; } article th, article td { padding-right: 5px; }
  .compare tr { display: grid; grid-template-columns: 1.1fr 1fr 1fr 1.2fr; align-items: center; }
  .compare tbody tr { border-top: 1px solid var(--line); padding: 4px 0; }
  .compare tbody th, .compare tbody td { border: 0; padding: 2px 4px 2px 0; }
  .compare tbody td:nth-child(2) { grid-row: 2; grid-column: 1 / -1; width: auto; }
  .compare thead th:nth-child(2) { display: none; }
}
@media print {
  :root { --page: #fff; --card: #fff; --text: #000; --soft: #444; --line: #ccc; --track: #eee;
    --dense: #808b9a; --pruned: #0b7a75; --good: #0b6b3a; --bad: #b3261e; --wash: #fff; --warn: #fff; }
  :root, body { font-size: 11px; } main { max-width: none; padding: 0; } section { padding: 10px 12px; }
  h2, h3, caption { break-after: avoid; } .scroll { background: none; overflow: visible; }
  tr, .tiles, .verdict, .notes { break-inside: avoid; } .long { max-height: none; }
  .widths { columns: 2; font-size: 10px; } .widths li { padding: 0; } th, td { padding-top: 2px; padding-bottom: 2px; }
  .tiles dd.value { font-size: 1.1rem; }
}
"""
