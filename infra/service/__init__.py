"""The ingest service: what robots may ask of the server, over HTTP, each with a credential of its own.

`backend` does the work and knows no HTTP; `auth` knows the credentials, `limits` who must wait; `desk` puts these
together for one robot's requests, `app` gives them routes (OpenAPI at `/openapi.json`), `listen` a port. Run it with
`python -m infra.service --home runs/local`.
"""
