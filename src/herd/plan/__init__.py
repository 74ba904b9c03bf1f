"""What fits, how fast, what it costs: the planner. No torch.

Floor 5. What other files of the room, and the command line, build on:

    machines.find_machine("2xRTX4090") -> Machine      count, device, per_node, link, network, rent, buy, join(ranks, stride)
    machines.catalogue(path) -> Catalogue      .machine(text), .device(name), .names(); documented in machines.yaml
    roofline.Device                            memory, bandwidth, flops by dtype, efficiency (default or measured)
    roofline.Efficiency, roofline.Curve        measured shares by rows (GEMM) and bytes (memory)
    roofline.Op, cost, seconds                 one operator on a Device: max(compute, memory) + overhead
    roofline.all_gather, all_reduce, send      collectives on a Link
    ops.forward_ops(config, ...) -> list[Op]   every operator of a forward pass: prefill, decode, training
    ops.decode_seconds, ops.prefill_seconds    these on a machine, with tensor parallelism

A training run: `layout` (TP, CP, PP, DP), `memory` (bytes of a rank), `step` (seconds by part), `search` (every
layout), `goodput` (failures), `money`, `training` (all of these together), `page` (charts), `rehearse` (real steps;
needs torch). Judged by `published` (what others measured), with `fit` where software has factors of its own:
bench/plan_published.py.
"""
