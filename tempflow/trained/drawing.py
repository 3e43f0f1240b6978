"""Pictures of one or several models of a run, or of a stack: `tempflow sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tempflow.common.errors import BadInput
from tempflow.credit.decoding import check_lost
from tempflow.parallel import ranks as processes
from tempflow.parallel.environment import read_place
from tempflow.prompts import Prompt
from tempflow.trained.output import make_folder
from tempflow.trained.pictures import Album
from tempflow.trained.sampling import Sampler, load_sampler, places_of
from tempflow.trained.source import Choice, Member, Source, check_choice, members


def draw(
    source: Source, choice: Choice, prompts: Sequence[Prompt], noises: int, seed: int | None, rows: int | None,
    folder: Path,
) -> str:  # fmt: skip
    """Pictures of every model asked for, of the same prompts and noises, in a folder; says where they are.

    Raises:
        BadInput: a checkpoint or model that cannot be had, or several processes.
        Halted: pictures of a model are NaN.
    """
    check_choice(source, choice)
    config, seed = source.config, source.config.eval.seed if seed is None else seed
    if read_place().size > 1:
        raise BadInput("WORLD_SIZE", read_place().size, "pictures are made by one process; start it without torchrun")
    ranks = processes.start(config.run.device)
    places = places_of(len(prompts), noises, source.rows(rows))
    sampler, _ = load_sampler(config, ranks, prompts, places, seed)
    about = {"run" if source.folder else "stack": str(source.folder or source.name), "seed": seed,
             "steps": config.eval.steps, "guidance": config.sample.guidance, "base": config.model.path,
             "lora": config.model.lora}  # fmt: skip
    make_folder(folder)
    album = Album(folder, prompts, noises, about)
    for member in members(source, choice):
        sampler.loaded.place(member.run)
        add_pictures(album, member, sampler)
    return album.finish()


def add_pictures(album: Album, member: Member, sampler: Sampler) -> None:
    """All pictures of one model.

    Raises:
        Halted: some of them are NaN.
    """
    places = sampler.places
    with tqdm(total=len(places.slots), desc=member.label, unit="picture") as bar:
        for call in places.calls:
            decoded = sampler(call)
            check_lost(decoded.counts()[None], f"of {member.label}", strict=True)
            pictures = decoded.images.permute(0, 2, 3, 1).numpy()
            for slot, noise, picture in zip(places.slots[call].tolist(), places.noises[call].tolist(), pictures,
                                            strict=True):  # fmt: skip
                album.add(member, slot, noise, picture)
            bar.update(len(pictures))
