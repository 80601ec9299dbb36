"""A deployment simulated: the policies of serving over traces, for thousands of replicas, without models."""
