"""Who decides: search spaces, the study, samplers, stopping rules, promotion; Ray Tune and Optuna, never a tensor."""
