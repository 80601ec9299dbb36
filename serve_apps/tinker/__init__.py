"""The Serve application `tinker`: the protocol of Tinker's SDK, in front of the trainers and the gateways."""
