"""What scripts and settings of another server need to run on this one."""
