"""TPUs that are not there: their facts, and what their compiler says of a run's program."""
