"""What a request passes before the application sees it: who asks, how much it sends, and how a refusal looks."""
