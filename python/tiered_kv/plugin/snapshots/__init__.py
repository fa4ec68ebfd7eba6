"""What the server looks like now: noted in the scheduler, served to administrators."""
