"""What came of it: likelihood, replies, the sampler's fit, the merge and its certificate, reports."""
