"""Do LAM tokens help a Diffusion Policy? The study behind docs/EVIDENCE.md, one command a table.

    python -m tests.benchmarks.study.offline --dataset.root=DIR --work_dir=WORK  # next actions, PushT
    python -m tests.benchmarks.study.conveyor --work_dir=WORK                     # where motion must be seen
    python -m tests.benchmarks.study.closed_loop --dataset.root=NEAR --work_dir=WORK  # success, near the goal
    python -m tests.benchmarks.study.report --work_dir=WORK --study=5             # a table and its picture

DIR and NEAR hold PushT demonstrations, recorded without a download:

    lerobot-lam-demo --record_only=true --near_goal=false --first_seed=100 --num_episodes=206 --root=DIR
    lerobot-lam-demo --record_only=true --near_goal=true --first_seed=20000 --num_episodes=500 --root=NEAR

Each finished run is a line in `WORK/<table>.jsonl`; a command that is run again goes on where it stopped.
"""
