"""What the server and its model cost, as ratios measured side by side."""
