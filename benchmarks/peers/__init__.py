"""What people would use instead, on the same weights and inputs; one file each."""
