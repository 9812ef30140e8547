"""What every gRPC server and client here shares: hosts, channels, TLS, bearer tokens, and the table of errors."""
