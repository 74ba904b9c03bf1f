"""The planner: predicts what fits on a machine, how fast it runs and what it costs.

Machines: `machines` reads the catalogue (``machines.yaml``), `profile` stores the measurements of this
machine. Time of operators: `roofline` (one operator on one device) and `ops` (the operators of a forward
pass). Training: `layout` (tensor, context, pipeline and data parallelism), `memory` (bytes per rank), `step`
(seconds per step), `search` (all layouts), `goodput` (failures), `money`, `training` (the whole plan) and
`page` (charts). Running: `ways` (weight formats and KV caches), `serve` (users and draft models), `prices`.
Checks: `score` stores predictions with measurements, `rehearse` trains a few steps of a recipe.
"""
