"""What would become of somebody's images, before anything is trained: `raphael data check`."""
