"""Load tests of an OpenAI-compatible server on Locust, with what serving a language model needs measured."""
