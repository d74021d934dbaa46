"""What every process shows of itself: metrics for Prometheus, and traces and times of each episode's path.

`metrics` and `catalog_metrics` say what is measured, `milestones` where an episode's path is timed; `instruments`,
`exposition` and `tracing` are how. Without `metrics_port` or an OpenTelemetry endpoint every call returns at once.
"""
