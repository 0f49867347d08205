"""What `dmoe doctor` looks at: facts of the machine, and what each means for a run. One finding per line."""
