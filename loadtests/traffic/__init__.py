"""Load tests of a running server: arrivals, requests, Locust users, open loop, reports."""
