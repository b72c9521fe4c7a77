"""Do LAM tokens help a Diffusion Policy? The study behind docs/EVIDENCE.md, one command a table.

    python -m tests.benchmarks.study.offline --dataset.root=DIR --work_dir=WORK  # next actions, PushT
    python -m tests.benchmarks.study.conveyor --work_dir=WORK                     # where motion must be seen
    python -m tests.benchmarks.study.closed_loop --dataset.root=DIR --work_dir=WORK --device=cuda
    python -m tests.benchmarks.study.report --work_dir=WORK --images=docs/images  # tables and pictures

DIR holds standard PushT demonstrations, recorded without a download:

    lerobot-lam-demo --record_only=true --near_goal=false --first_seed=100 --num_episodes=206 --root=DIR

Each finished run is a line in `WORK/<table>.jsonl`; a command that is run again goes on where it stopped.
"""
