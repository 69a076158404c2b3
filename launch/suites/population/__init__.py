"""The suite `population`: federated rounds by chunk, cohort, budget and device, and other packages."""
