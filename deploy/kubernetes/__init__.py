"""Manifests for KubeRay, with kustomize."""
