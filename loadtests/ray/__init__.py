"""The app on Ray Serve: a cluster on this machine, and its autoscaling as a curve."""
