#!/usr/bin/env bash
# Builds the image of launch/Dockerfile from the committed code, and pushes it with --push.
#
#     launch/build_image.sh us-docker.pkg.dev/my-project/images/spvit_jax [--push]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# < 1 || $# > 2)) || [[ ! $1 =~ ^[a-z0-9][a-z0-9._/:-]*$ || ${2:---push} != --push ]]; then
  echo "error: expected an image's name and nothing or --push; got '$*'" >&2
  exit 2
fi
version=$(git rev-parse --short HEAD)
if [[ -n $(git status --porcelain --untracked-files=no) ]]; then
  echo "note: the image gets commit $version, without your uncommitted changes" >&2
fi

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git archive HEAD | tar -x -C "$context"
echo "$version" >"$context/VERSION"
docker build --platform=linux/amd64 --tag="$1:$version" --file="$context/launch/Dockerfile" "$context"
if [[ $# == 2 ]]; then docker push "$1:$version"; fi
echo "$1:$version"
