"""What the server looks like now, for whoever may know: noted in the scheduler, served over HTTP."""
