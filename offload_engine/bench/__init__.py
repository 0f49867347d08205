"""`dmoe bench`: contenders measured against each other in one run, each in a process of its own."""
