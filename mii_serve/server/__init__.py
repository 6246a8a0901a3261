"""The front process: public gRPC service, health, reflection, and the care of its replica. Never imports torch."""
