"""What Prometheus and Grafana are given to look after a release of the chart."""
