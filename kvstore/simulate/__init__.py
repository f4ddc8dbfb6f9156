"""What happens under a plan: discrete events, with the policies of `kvstore.schedule` and the index of the pool."""
