"""What knows of disks and processes only: where files lie, whole or not at all, deadlines, processes that end."""
