"""Where the music comes from: every source becomes normalised MIDI and one manifest, read once, then cached."""

import hashlib
import importlib.util
import io
import json
import os
import re
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from mtxlib.config import SPLITS
from mtxlib.files import append, atomic_text, locked
from mtxlib.music.readers import KINDS, STEADY, read_apart

FORM = 2  # raise it when the normal form or the manifest changes: older caches are then rebuilt
ENDS = dict(zip(SPLITS, (0.8, 0.9, 1.0), strict=True))  # where each split ends, as a share of the tunes
JSFAKES_URL = "https://github.com/omarperacha/js-fakes/archive/68b476d5b265e579d87c74a68f2160f26007fa56.zip"
JSFAKES_SHA256 = "3deb874011b8c4ac5d01874ee2ea4140ba88c69c224ccb6cbca0b3ebdc7df6d4"  # of midi/*.mid, not of the zip
JSB_URL = "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/master/Jsb16thSeparated.json"
LICENCES = {
    "bach": "see music21's corpus/license.txt: distributed with the encoders' permission (mostly Margaret Greentree, "
            "used by permission); commercial use may be restricted",
    "jsfakes": "CC BY 4.0, Omar Peracha",
    "jsb": "music in the public domain; see czhuang/JSB-Chorales-dataset",
    "folder": "as given by you",
}


@dataclass(frozen=True)
class Piece:
    """One line of the manifest that was kept."""

    name: str  # bwv269, jsfakes-007, jsb-test-012, or the path inside the folder
    path: Path  # the normalised MIDI
    source: str
    split: str  # train, valid or test
    bars: int
    metre: str  # "4/4", or "4/4,3/4" in order of appearance
    voices: int  # tracks; all drums are one
    tune: str  # hash of the first ten intervals of the highest voice
    licence: str
    key: str  # "C major", "a minor"; "" if unknown
    losses: dict = field(default_factory=dict, compare=False)  # counted, see `music.readers.losses`


def load_corpus(source: str = "bach", data_dir: str | Path = "data", *, archive: str = "", limit: int = 0,
                form: dict | None = None, workers: int | None = None, progress: bool = True) -> list[Piece]:
    """Prepare what is missing under `data_dir`, print one summary line per source and return the pieces that were kept.

    source: bach, jsfakes, jsb, folder, or a sum such as "bach+jsfakes".
    archive: any tree of MIDI and MusicXML (folder), or what to read instead of a download, which nothing needs once it
      is cached: a zip or folder (jsfakes), the JSON file (jsb). For several sources: "jsfakes=a.zip,jsb=b.json". One
      that is new or changed rebuilds the cache.
    limit: keep only the first pieces of each source, in a cache of their own; 0 keeps all.
    form: dials of `music.normal.normalise` that differ from its defaults; each choice has a cache of its own.

    Splits go by tune, the same in every source. jsb keeps its own; in a sum with it, the others follow it where it has
    their tune, test before valid before train. Raises ValueError for an unknown source, an archive that cannot be read
    and a source with no usable piece, ConnectionError if a download fails.
    """
    loaded = [load_source(name, Path(data_dir), path, limit, form or {}, workers, progress)
              for name, path in parse_archives(source, archive).items()]
    kept = [e for _, entries in loaded for e in entries if "file" in e]
    own = {e["tune"]: split for split in SPLITS for e in kept if e["source"] == "jsb" and e["split"] == split}
    splits, pieces = split_by_tune((e["tune"] for e in kept), own), []
    for folder, entries in loaded:
        name = entries[0]["source"]
        part = [Piece(**{f: e.get(f) for f in Piece.__annotations__} | {"path": folder / e["file"]} | (
            {"split": splits[e["tune"]]} if name != "jsb" else {})) for e in entries if "file" in e]
        counts = Counter(p.split for p in part)
        counted = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
        print(f"{name}: {len(part)} pieces ({counted}){skipped(entries)}{unsteady(part)} in {folder}")
        pieces += part
    return pieces


def split_by_tune(tunes: Iterable[str], taken: dict[str, str]) -> dict[str, str]:
    """Tune -> split: as in `taken`, else 80/10/10 by the hash of the tune. If that leaves a split empty and there are
    three tunes or more, the tune whose hash is nearest to its end moves there."""
    place = {t: int(hashlib.sha256(f"split:{t}".encode()).hexdigest()[:13], 16) / 16**13 for t in sorted(set(tunes))}
    splits = {t: taken.get(t) or next(s for s, end in ENDS.items() if p < end) for t, p in place.items()}
    for split, end in ENDS.items():
        sizes = Counter(splits.values())
        free = [t for t in splits if t not in taken and sizes[splits[t]] > 1]
        if split not in sizes and len(splits) >= 3 and free:
            splits[min(free, key=lambda t: abs(place[t] - end))] = split
    return splits


def bach_tasks(_: str) -> list[tuple]:
    folder = Path(importlib.util.find_spec("music21").origin).parent / "corpus" / "bach"
    kinds = {".mxl": "chorale", ".xml": "chorale", ".krn": "other rights: encodings in .krn"}
    return [(f.stem, kinds[f.suffix], str(f), "") for f in sorted(folder.iterdir()) if f.suffix in kinds]


def jsfakes_tasks(archive: str) -> list[tuple]:
    where = archive or JSFAKES_URL
    if Path(where).is_dir():
        files = {f.relative_to(where): f.read_bytes() for f in files_of(Path(where)) if f.suffix == ".mid"}
    else:
        try:
            with zipfile.ZipFile(io.BytesIO(fetch("jsfakes", JSFAKES_URL, archive))) as z:
                files = {Path(name): z.read(name) for name in z.namelist() if name.endswith(".mid")}
        except zipfile.BadZipFile as e:
            raise ValueError(f"{where}: expected a zip of js-fakes: {e}") from e
    files = {f.stem: data for f, data in files.items() if f.parent.name in ("midi", "")}
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
    if digest != JSFAKES_SHA256:
        message = f"{where} is not js-fakes as expected: {len(files)} files, SHA-256 {digest}"
        if not archive:
            raise ValueError(f"{message}, expected 500 and {JSFAKES_SHA256}; pass a good copy as archive")
        print(f"jsfakes: {message}; reading it all the same")
    return [(f"jsfakes-{name:0>3}", "bytes", files[name].decode("latin-1"), "")
            for name in sorted(files, key=lambda name: (len(name), name))]


def jsb_tasks(archive: str) -> list[tuple]:
    try:
        data = json.loads(fetch("jsb", JSB_URL, archive))
        tasks = [(i / len(data[s]), (f"jsb-{s}-{i:03}", "grid", p, s)) for s in SPLITS for i, p in enumerate(data[s])]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{archive or JSB_URL}: expected JSON with lists train, valid and test, got {e!r}") from e
    return [task for _, task in sorted(tasks)]  # the splits interleaved: `limit` leaves some of each


def folder_tasks(archive: str) -> list[tuple]:
    return [(str(f.relative_to(archive)), KINDS.get(f.suffix.lower(), "not MIDI or MusicXML"), str(f), "")
            for f in files_of(Path(archive))]


TASKS = {"bach": bach_tasks, "jsfakes": jsfakes_tasks, "jsb": jsb_tasks, "folder": folder_tasks}


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below a folder; links are followed, each folder once."""
    found, seen = [path] if path.is_file() else [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
        else:
            found += [Path(folder, name) for name in names]
        seen.add(real)
    return sorted(found)


def fetch(source: str, url: str, archive: str) -> bytes:
    if archive:
        return Path(archive).read_bytes()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except OSError as e:
        raise ConnectionError(f"{source}: could not download {url}: {e}; fetch it by other means and give its path as "
                              f"archive ({source}=PATH in a sum of sources)") from e


def parse_archives(source: str, archive: str) -> dict[str, str]:
    """Source -> its archive, "" for none; `load_corpus` says how both are written."""
    names, which = source.split("+"), "|".join(TASKS)
    if set(names) - set(TASKS) or len(set(names)) < len(names):
        raise ValueError(f"source {source!r}: expected {', '.join(TASKS)}, or different ones of them joined by +")
    users = [name for name in names if name != "bach"]
    given = dict(re.findall(f"(?:^|,)({which})=(.*?)(?=,(?:{which})=|$)", archive))
    given = given or dict.fromkeys(users if archive and len(users) == 1 else (), archive)
    if set(given) - set(users) or archive and not given:
        raise ValueError(f"archive {archive!r} for source {source!r}: expected a path for {users or 'none'}; for "
                         f"several write jsfakes=a.zip,jsb=b.json")
    for name in {*given, *(set(users) & {"folder"})}:
        if not given.get(name) or not Path(given[name]).exists():
            raise ValueError(f"source {name!r}: archive {given.get(name, '')!r} does not exist")
    return dict.fromkeys(names, "") | given


def load_source(source: str, data_dir: Path, archive: str, limit: int, form: dict, workers: int | None,
                progress: bool) -> tuple[Path, list[dict]]:
    """The cache folder of a source and its manifest, which one process at a time builds where it is missing or old."""
    where, files = os.path.realpath(archive), files_of(Path(archive)) if archive else []
    states = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]  # links may lead nowhere
    stamp = f"{FORM} " + (short_hash(f"{where}{states}") if archive else "")
    choices = [f"{name}{value:d}" for name, value in sorted(form.items()) if value and (name, value) != ("grid", 4)]
    folder = data_dir / "-".join([source, *([short_hash(where)] if source == "folder" else []), *choices,
                                  *([f"limit{limit}"] if limit else [])])
    entries = cached(folder, stamp)
    if not entries:
        with locked(folder / ".lock", f"waiting for another process that reads {source} into {folder}"):
            entries = cached(folder, stamp) or build(source, folder, archive, limit, form, workers, progress, stamp)
    if not any("file" in e for e in entries):
        raise ValueError(f"source {source!r} has no usable piece{skipped(entries)}; the reasons are in "
                         f"{folder / 'manifest.json'}")
    return folder, entries


def cached(folder: Path, stamp: str) -> list[dict]:
    """The entries of the manifest if it bears this stamp, or a longer one, and all its files are there."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else []
    fresh = entries and entries[0]["stamp"].startswith(stamp)
    return entries if fresh and all((folder / e["file"]).exists() for e in entries if "file" in e) else []


def build(source: str, folder: Path, archive: str, limit: int, form: dict, workers: int | None,
          progress: bool, stamp: str) -> list[dict]:
    """Read every task of a source. Each entry is noted as it comes: if this is stopped, the next call goes on there."""
    tasks, entries, files = [], [], []
    for i, task in enumerate(TASKS[source](archive)):
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", task[0])[-80:]
        file = f"{i:05}-{slug}.mid" if source == "folder" else f"{slug}.mid"
        tasks.append((*task, str(folder.absolute() / file), form))
    notes = folder / f"{short_hash(stamp)}.part"
    lines = [line for line in notes.read_text().splitlines() if line.endswith("}")] if notes.exists() else []
    atomic_text(notes, "".join(f"{line}\n" for line in lines))
    with closing(read_apart(tasks[len(lines):], workers)) as results:
        for entry in tqdm(chain(map(json.loads, lines), results), source, limit or len(tasks), unit=" files",
                          disable=not progress):
            if len(entries) >= len(lines):
                append(notes, [json.dumps(entry)])
            entries.append({**entry, "source": source, "licence": LICENCES[source], "stamp": stamp})
            files += [folder / entry["file"]] if "file" in entry else []
            if len(files) == limit > 0:
                break
    atomic_text(folder / "manifest.json", json.dumps(entries, indent=1))
    for stale in {*folder.glob("*.mid"), *folder.glob("*.part")} - {*files}:
        stale.unlink()
    return entries


def short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def skipped(entries: list[dict]) -> str:
    counts = Counter(e["skipped"].split(":")[0] for e in entries if "skipped" in e)
    reasons = ", ".join(f"{n} {why}" for why, n in counts.most_common())
    return f", {counts.total()} skipped ({reasons})" if counts else ""


def unsteady(pieces: list[Piece]) -> str:
    """Names those whose music is not on the quarters of their files: performances, or other beats than the file's."""
    names = [p.name for p in pieces if p.losses["steady"] < STEADY]
    return (f", {len(names)} not on the grid of their quarters (under {STEADY:.0%} of the onsets on their 32nds or "
            f"triplets: {', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else "")
