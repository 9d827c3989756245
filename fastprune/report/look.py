"""The look of the report's page: one style sheet, light and dark, from 320 pixels up."""

LOOK = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1d21; --soft: #555b66; --line: #dcdfe4;
  --grid: #e4e6ea; --outline: #cfd4dc; --accent: #0063a6; --good: #00704d; --bad: #b03a00;
  --series0: #0072b2; --series1: #c84e00; --series2: #007d5a; --series3: #b0568b; --series4: #a86f00;
  --series5: #2d8fc4; --series6: #5a5b5c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --card: #1d2026; --ink: #e8eaed; --soft: #a9b0bb; --line: #343942;
    --grid: #2b3038; --outline: #4a515c; --accent: #6bb7f0; --good: #4fd1a5; --bad: #ff9a66;
    --series0: #56b4e9; --series1: #ff8a4c; --series2: #35c795; --series3: #e39cc6; --series4: #f0b93a;
    --series5: #9ad4f5; --series6: #c3c6cb; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
  margin: 0; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
.kicker { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4.4vw, 2.7rem); line-height: 1.15; margin: .4rem 0 1.4rem; letter-spacing: -.02em; }
h1 span { display: inline-block; } h1 span:not(:last-child)::after { content: ","; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .9rem; }
.tile { background: var(--card); border-radius: .6rem; padding: .9rem 1.1rem; display: flex; flex-direction: column; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile small { color: var(--soft); font-size: .875rem; display: block; }
.pair { margin-top: auto; padding-top: .5rem; }
.pair i { display: block; height: .5rem; border-radius: .25rem; margin-top: .25rem; }
.pair .full { background: var(--outline); } .pair .kept { background: var(--series0); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: .3rem 0 0; overflow-wrap: anywhere; }
.narrow { display: none !important; }
@media (max-width: 44rem) { .narrow { display: block !important; } .wide { display: none !important; } }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .2rem 0 .8rem; padding: 0;
  list-style: none; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: .9rem; height: .7rem; border-radius: .15rem; margin-right: .4rem; }
.bars { columns: 26rem 2; column-gap: 2.5rem; margin: 0; padding: 0; list-style: none; }
.bars li { break-inside: avoid; display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 14fr) 6.2em;
  gap: .6rem; align-items: center; font-size: .8rem; line-height: 1.25; padding: .1rem 0; }
.bars .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; direction: rtl; text-align: right; }
.bars .track { border: 1px solid var(--outline); border-radius: .15rem; overflow: hidden; min-width: 3px; }
.bars .track i { display: block; height: .6rem; }
.bars .track i + i { margin-top: 1px; }
.bars .number { font-variant-numeric: tabular-nums; color: var(--soft); white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100%; }
th, td { padding: .35rem 1rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 500; overflow-wrap: anywhere; }
.runs th { white-space: nowrap; } .runs th, .runs td { padding-right: .8rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: 0 1rem; margin: .6rem 0; }
details[open] { padding-bottom: .8rem; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 500; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; margin: .4rem 0; overflow-x: auto;
  font: .82rem/1.55 ui-monospace, "SFMono-Regular", Consolas, "DejaVu Sans Mono", monospace; user-select: all; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { color: var(--soft); font-size: .85rem; margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
"""
