#!/bin/sh
# Makes an image to build in, if debian:trixie-slim cannot be pulled: with debootstrap, from the mirrors that this machine's
# apt is configured for. Needs root, and `apt-get install debootstrap`.
#   build/here/base.sh TAG
set -eu

tag=$1
release=trixie

fail() {
    echo "livenessprobe: $1" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "debootstrap must run as root: sudo make base-image, or set BUILD_IMAGE to a Debian 13 image"
command -v debootstrap >/dev/null ||
    fail "there is no debootstrap here: apt-get install debootstrap, or set BUILD_IMAGE to a Debian 13 image"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The Debian repositories of this machine: one line each, `bookworm-security ADDRESS`.
# shellcheck disable=SC2016  # the names are apt's
apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
    sort -u >"$folder/repositories"
[ -s "$folder/repositories" ] ||
    fail "apt knows no Debian repository here: apt-get update, or set BUILD_IMAGE to a Debian 13 image"
here=$(cut -d- -f1 "$folder/repositories" | cut -d' ' -f1 | sort -u | head -n 1)
sed -n "s/^$here\(-[a-z]*\)\? \(.*\)/deb \2 $release\1 main/p" "$folder/repositories" >"$folder/sources.list"
mirror=$(sed -n "s/^deb \(.*\) $release main$/\1/p" "$folder/sources.list" | head -n 1)
[ -n "$mirror" ] || fail "apt has no main Debian repository here: set BUILD_IMAGE to a Debian 13 image"
case $(cat "$folder/sources.list") in
    *https:*) more=--include=ca-certificates ;;
    *) more= ;;
esac

# debootstrap checks the release's signature with the keys of debian-archive-keyring.
debootstrap --variant=minbase $more "$release" "$folder/root" "$mirror" >"$folder/log" 2>&1 || {
    tail -n 20 "$folder/log" >&2
    fail "debootstrap failed; does this machine's debian-archive-keyring know $release?"
}
cp "$folder/sources.list" "$folder/root/etc/apt/sources.list"
rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/usr/share/doc "$folder"/root/usr/share/man
tar -C "$folder/root" -c . | "${DOCKER:-docker}" import --message "debootstrap $release" - "$tag" >/dev/null
