"""What a head is: its base, its read-out as plain layers, its feature map."""
