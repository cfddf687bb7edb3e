"""A score on paper: MusicXML, and engraved as SVG.

Notation works on 24 positions a quarter. Each beat of a staff is written in 16ths, triplets of 8ths, 32nds or triplets
of 16ths: the coarsest that moves its notes least; what lies on none of them, or mixes them in one hand, is rounded.
Notes are cut here, at bars and beats: music21, imported only where it is used, cuts at bars only.
"""

from bisect import bisect_right
from collections import defaultdict
from fractions import Fraction
from itertools import count, pairwise
from xml.etree import ElementTree

import numpy as np
import symusic

from mtxlib.music.score import VOICES, bar_starts

QUARTER = 24  # positions
STEPS = (6, 8, 3, 4)  # 16ths, triplets of 8ths, 32nds, triplets of 16ths, the coarser first
TRIPLETS = (8, 4)
VALUES = (1, 2, 3, 6, 9, 12, 18, 24, 36, 48, 72, 96, 144)  # what one head or rest can last, outside triplets
KIT = {drum: place for place, drums in {  # where General MIDI's drums stand on the staff
    "F4": (35, 36), "G4": (41,), "A4": (43,), "B4": (45,), "C5": (37, 38, 39, 40), "D5": (47,), "E5": (48, 50),
    "F5": (51, 53, 59), "G5": (42, 44, 46), "A5": (49, 52, 55, 57)}.items() for drum in drums}
CYMBALS = ("F5", "G5", "A5")  # printed as x
NAME = 24  # characters of a track's name that a picture shows


def short(name: str) -> str:
    return name if len(name) <= NAME else name[:NAME - 1] + "…"


def named_voices(*scores) -> list[list[tuple[str, int, symusic.Track]]]:
    """For each score (name, place, track) of every track with notes, in the order of the places; the place chooses the
    colour. A track is known by its program in all these scores, whatever rests in one of them or has no name there: the
    first score with it decides. Choral voices stand from the top."""
    names, found = {}, []  # names: in the order of the places
    for score in scores:
        programs, seen, voices = [t.program for t in score.tracks], defaultdict(count), []
        if ({42} != set(programs) <= set(VOICES) and len(set(programs)) == len(programs)  # 42 alone is a cello
                and all(t.name in ("", VOICES[t.program]) for t in score.tracks)):
            names |= {(program, False, 0): names.get((program, False, 0)) or name for program, name in VOICES.items()}
        for track in score.tracks:
            kind = track.program, track.is_drum
            key = (*kind, next(seen[kind]))  # two tracks of one program are told apart by their order
            names[key] = names.get(key) or track.name
            if track.notes:
                voices.append((key, track))
        found.append(voices)
    places = {key: place for place, key in enumerate(names)}
    named = {key: name or ("Drums" if key[1] else f"Track {places[key] + 1}") for key, name in names.items()}
    return [[(named[key], places[key], track) for key, track in sorted(voices, key=lambda v: places[v[0]])]
            for voices in found]


def bars_of(score) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, end, (beats, unit)) of every bar in ticks; 4/4 until told otherwise; an empty score has one bar."""
    metres = {0: (4, 4)} | {t.time: (t.numerator, t.denominator) for t in score.time_signatures}
    lines = bar_starts(score, max(1, score.end()))
    return [(start, end, metres[max(t for t in metres if t <= start)]) for start, end in pairwise(lines)]


def _cell(metre: tuple[int, int]) -> int:
    """Positions in a beat: a quarter, but an eighth in metres of eighths."""
    return max(1, min(QUARTER, 4 * QUARTER // metre[1]))


def _placed(notes, cells, picture) -> tuple[list[tuple[int, int, int]], set[int]]:
    """Notes as (start, end, pitch) where they can be written in the beats, (start, end) each, and the starts of those
    in triplets. The onsets choose the step, and then, but not in a picture, the ends."""
    notes, (starts, ends) = np.array(notes), np.array(cells).T
    cell = np.searchsorted(starts, notes[:, :2], "right") - 1
    offsets = notes[:, :2] - starts[cell]
    moved = [np.abs(offsets - _nearest(offsets, step)) * [10 ** 6, not picture] for step in STEPS]
    moved = np.array([np.bincount(cell.ravel(), by.ravel(), len(cells)) for by in moved])
    moved[(ends - starts) % np.reshape(STEPS, (-1, 1)) > 0] = np.inf
    steps = np.where(np.isinf(moved).all(0), 1, np.take(STEPS, moved.argmin(0)))
    begin, end = (starts[cell] + _nearest(offsets, steps[cell])).T
    begin = np.minimum(begin, ends[-1] - steps[-1])
    end = np.maximum(end, begin + steps[np.searchsorted(starts, begin, "right") - 1])
    return np.stack([begin, end, notes[:, 2]], 1).tolist(), set(starts[np.isin(steps, TRIPLETS)].tolist())


def _nearest(time, step):
    return (2 * time + step) // (2 * step) * step


def _lines(notes, triplets, single) -> list[tuple[set[int], list[tuple[int, int, list[int]]]]]:
    """(triplets, chords as (start, end, pitches)) of each line: equal spans form a chord, overlapping ones go to a
    further line. In a `single` line what starts together ends together, where the next begins at the latest."""
    if single:
        ends = {start: end for start, end, _ in sorted(notes)}
        following = dict(pairwise(ends))
        notes = [(start, min(ends[start], following.get(start, ends[start])), pitch) for start, _, pitch in notes]
    chords, lines = defaultdict(set), []
    for start, end, pitch in notes:
        chords[start, end].add(pitch)
    for (start, end), pitches in sorted(chords.items(), key=lambda c: (c[0][0], -max(c[1]))):
        line = next((x for x in lines if x[-1][1] <= start), [])
        if not line:
            lines.append(line)
        line.append((start, end, sorted(pitches)))
    return [(triplets, line) for line in lines]


def _staves(track, cells, picture) -> list[list]:
    """The lines of each staff of a track. In a picture it has two, split at middle C, where notes overlap and no clef
    holds them with two ledger lines; a hand is one line there, and so is what would need three."""
    notes = [(n.start, n.end, n.pitch) for n in track.notes]
    if track.is_drum:  # a hit has no length of its own: it lasts to the next one, or to the end of its beat
        placed, triplets = _placed(notes, cells, True)
        ends = [end for _, end in cells]
        return [_lines([(at, ends[bisect_right(ends, at)], drum) for at, _, drum in placed], triplets, True)]
    pitches, overlap = [n.pitch for n in track.notes], any(a[1] > b[0] for a, b in pairwise(sorted(notes)))
    two = picture and overlap and min(pitches) < 55 and max(pitches) > 65
    staves = []
    for hand in ([n for n in notes if n[2] >= 60], [n for n in notes if n[2] < 60]) if two else [notes]:
        placed, triplets = _placed(hand, cells, picture)
        lines = _lines(placed, triplets, two)
        staves.append(_lines(placed, triplets, True) if picture and len(lines) > 2 else lines)
    return staves


def _split(at: int, length: int, metre: tuple[int, int], triplets=()):
    """Lengths that make up a note or rest at this place of the bar, each one writable and fair to the beat; `triplets`:
    where in the bar the beats in triplets start."""
    cell, compound = _cell(metre), metre[0] % 3 == 0 and metre[1] >= 8
    beat = 3 * cell if compound else cell
    while length:
        begin, off = at - at % cell, at % beat
        if begin in triplets and (at > begin or length < cell):
            room = min(length, begin + cell - at)
            part = max(v for v in (1, 2, 4, 8, 12, 16) if v <= room and (v != 12 or at % 12 == 0))
        else:
            last = (at + length) // cell * cell  # what ends within triplets is cut before them
            room = last - at if last in triplets and last > at else length
            syncopated = room == beat == 2 * off == QUARTER  # a quarter between two beats stays whole
            room = min(room, beat - off) if off and not syncopated else room
            room = min(room, 6 - at % 6) if at % 6 else room
            part = max(v for v in VALUES
                       if v <= room and (off or room < beat or v % beat == 0 or v == room and not compound))
        yield part
        at, length = at + part, length - part


def _spell(pitch: int, fifths: int) -> dict:
    """Step, accidental and octave of a MIDI pitch, as music21 takes them: the twelve names from two fifths below the
    scale of the key to four above it. This names 99.8 % of the notes of Bach's chorales as printed."""
    place = fifths - 2 + (7 * pitch - fifths + 2) % 12  # on the line of fifths, C = 0
    alter = (place + 1) // 7
    return {"step": "FCGDAEB"[(place + 1) % 7], "accidental": alter, "octave": (pitch - alter) // 12 - 1}


def _element(pitches, fifths, drums):
    """A rest, note or chord of MIDI pitches; drums stand at their places on the staff."""
    from music21 import chord, note, percussion, pitch

    if drums:
        heads = [note.Unpitched(place) for place in dict.fromkeys(KIT.get(p, "D4") for p in pitches)]
        for head in heads:
            head.notehead = "x" if head.displayName in CYMBALS else "normal"
    else:
        heads = [note.Note(pitch.Pitch(**_spell(p, fifths))) for p in pitches]
    if len(heads) > 1:
        return percussion.PercussionChord(heads) if drums else chord.Chord(heads)
    return heads[0] if heads else note.Rest()


def _fill(line, bar, fifths, drums):
    """What a line has in this bar, as music21 elements in order: notes, cut and tied where needed, and rests."""
    from music21 import tie

    triplets, chords = line
    (start, end, metre), at = bar, bar[0]
    triplets = {t - start for t in triplets if start <= t < end}
    for begin, stop, pitches in [*(c for c in chords if c[0] < end and c[1] > start), (end, end, [])]:
        for until, sounding in ((max(begin, at), []), (min(stop, end), pitches)):
            for length in _split(at - start, until - at, metre, triplets):
                element = _element(sounding, fifths, drums)
                element.quarterLength = Fraction(length, QUARTER)
                if sounding and (begin < at or at + length < stop):
                    element.tie = tie.Tie("start" if at == begin else "stop" if at + length == stop else "continue")
                yield element
                at += length


def _accidentals(measure, signature) -> None:
    """Print an accidental where a pitch departs from the key, or from the last note on its line in this bar."""
    seen = {}
    for n in sorted(measure.recurse().notes, key=lambda n: n.offset):
        tied = n.tie is not None and n.tie.type != "start"
        for p in n.pitches:
            usual = signature.accidentalByStep(p.step)
            before = seen.get((p.step, p.octave), usual.alter if usual else 0)
            p.accidental.displayStatus = not tied and p.alter != before
            if not tied:
                seen[p.step, p.octave] = p.alter


def _part(lines, bars, fifths, drums, paired):
    """One staff as a music21 part, bar by bar; `paired`: two voices of a choir, stems up and down."""
    from music21 import clef, key, meter, stream
    from music21.stream.makeNotation import makeTupletBrackets

    mean = np.mean([pitch for _, chords in lines for *_, pitches in chords for pitch in pitches] or [60])
    part, signature = stream.Part(), key.KeySignature(0 if drums else fifths)
    for i, bar in enumerate(bars):
        measure, rests = stream.Measure(number=i + 1), set()
        if i == 0:
            measure.clef = clef.PercussionClef() if drums else clef.TrebleClef() if mean >= 60 else clef.BassClef()
            measure.keySignature = signature
        if i == 0 or bar[2] != bars[i - 1][2]:
            measure.timeSignature = meter.TimeSignature(f"{bar[2][0]}/{bar[2][1]}")
        for k, line in enumerate(lines or [(set(), [])]):
            measure.insert(0, voice := stream.Voice(id=str(k + 1)))
            for x in _fill(line, bar, fifths, drums):
                voice.append(x)
                for bracket in x.duration.tuplets:
                    bracket.placement = "below" if paired and k else "above"
                if not x.isRest and paired:
                    x.stemDirection = "down" if k else "up"
                elif x.isRest:  # a rest of two voices is printed once; inside a track the upper line has them
                    span = x.offset, x.quarterLength
                    x.style.hideObjectOnPrint = k > 0 and (not paired or span in rests)
                    rests.add(span)
            if any(bar[0] <= t < bar[1] for t in line[0]):
                makeTupletBrackets(voice, inPlace=True)
        _accidentals(measure, signature)
        part.append(measure)
    measure.rightBarline = "final"
    return part.makeBeams(setStemDirections=False)


def musicxml(score, picture: bool = False) -> str:
    """The score as MusicXML, a part a track, key signature and spelling guessed; four single voices go on two staves.
    `picture`: for the eye, see `_staves`."""
    from music21 import instrument, layout, note, stream, tempo
    from music21.musicxml.m21ToXml import ScoreExporter

    score, whole = score.resample(QUARTER, 1), stream.Score()
    pitched = stream.Stream([note.Note(n.pitch, quarterLength=n.duration / QUARTER)
                             for t in score.tracks if not t.is_drum for n in t.notes])
    fifths = (pitched.analyze("key").sharps + 5) % 12 - 5 if len(pitched) else 0
    bars = bars_of(score)
    cells = [(at, min(at + _cell(metre), end)) for start, end, metre in bars for at in range(start, end, _cell(metre))]
    voices = [(name, track, _staves(track, cells, picture)) for name, _, track in named_voices(score)[0]]
    paired = len(voices) == 4 and all(len(s) == 1 == len(s[0]) and not track.is_drum for _, track, s in voices)
    if paired:
        voices = [("", None, [voices[i][2][0] + voices[i + 1][2][0] for i in (0, 2)])]
    for name, track, staves in voices or [("", None, [[]])]:
        name, is_drum = name if len(voices) > 1 else "", track is not None and track.is_drum
        parts = [_part(lines, bars, fifths, is_drum, paired) for lines in staves]
        braced = len(parts) > 1  # the brace has the name
        for part in parts:
            whole.insert(0, part)
            part.insert(0, player := instrument.Instrument(name))
            player.partId = player.instrumentId = f"P{len(whole.parts)}"
            player.partName = "" if braced else short(name) if picture else name
            if track:
                player.midiProgram, player.midiChannel = track.program, 9 if is_drum else None
        if braced:
            whole.insert(0, layout.StaffGroup(parts, name=short(name), symbol="brace", barTogether=True))
    shown = 0  # a picture leaves out tempos within 5 % of the one it showed last
    for measure, (start, end, _) in zip(whole.parts[0].getElementsByClass("Measure"), bars, strict=True):
        for t in score.tempos:
            if start <= t.time < end and not (picture and abs(t.qpm - shown) < 0.05 * shown):
                shown = t.qpm
                mark = tempo.MetronomeMark(number=round(shown) if picture else round(shown, 3))
                measure.insert(Fraction(t.time - start, QUARTER), mark)
    root = ScoreExporter(whole, makeNotation=False).parse()
    for tag in ("movement-title", "identification"):  # music21's placeholders
        root.remove(root.find(tag))
    return ElementTree.tostring(root, encoding="unicode")


def notation(score, bars: int | None = None) -> str:
    """The score, or its first `bars`, as one SVG image 945 pixels wide: two staves for four voices, two for a pianist,
    else one staff a track.

    The page ends after 27,000 pixels, some 500 bars of a chorale: cut longer music into pieces.
    """
    import verovio

    score = score.clip(0, bars_of(score)[:bars][-1][1], clip_end=True) if bars else score
    longest = max((len(short(t.name)) for t in score.tracks), default=0)
    verovio.enableLog(verovio.LOG_ERROR)
    engraver = verovio.toolkit()
    engraver.setOptions({
        "header": "none", "footer": "none", "scale": 45, "pageWidth": 2100, "pageHeight": 60000, "pageMarginTop": 20,
        "pageMarginLeft": 20 + 4 * longest,  # fonts are wider than the engraver believes
        "adjustPageHeight": True, "spacingStaff": 14, "staffLineWidth": 0.2, "xmlIdChecksum": True,
        "svgCss": "svg {background: white}",  # also in a dark notebook
    })
    engraver.loadData(musicxml(score, picture=True))
    return engraver.renderToSVG(1)
