"""What a trial is: one adapter trained on one base, recorded and resumable."""
