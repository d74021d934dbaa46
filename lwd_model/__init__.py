"""The learning: what a policy, a critic and a value are, and how one batch of experience improves them.

From the equations up: `support` (categorical value support), `divl` (value learning), `returns` (n-step fields),
`chunks` (replay of action chunks), `flow` (flow matching), `qam` (policy extraction by adjoint matching); then the
networks, the agent, the learner, the baselines and the evaluation that stand on them. Nothing here knows an
orchestrator, an event log or a database driver.
"""
