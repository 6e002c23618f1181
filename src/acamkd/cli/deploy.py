"""Commands on a finished run: evaluate, benchmark, export, predict, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from acamkd.cli.app import AsJson, Overrides, RunFolder, app, examples, run_of, show, show_json
from acamkd.errors import AcamkdError


@app.command(
    epilog=examples(
        "acamkd evaluate runs/camvid/distilled",
        "acamkd evaluate runs/camvid/distilled --set data.root=/data/camvid --json",
        "acamkd evaluate runs/camvid/distilled --set data.val.images=images/test --set data.val.masks=masks/test",
        "acamkd evaluate runs/camvid/distilled --split test",
    )
)
def evaluate(
    run: RunFolder,
    set_: Overrides = None,
    split: Annotated[
        Literal["val", "test"], typer.Option(help="Which images of the recipe: data.val or data.test.")
    ] = "val",
    epoch: Annotated[
        Literal["best", "last"],
        typer.Option(
            help="Weights: of the epoch with the best validation score, or of the last one, which needs last.ckpt."
        ),
    ] = "best",
    as_json: AsJson = False,
) -> None:
    """Score a run's network on its validation or test images."""
    opened = run_of(run, set_)
    from acamkd.jobs.evaluate import evaluate as job

    scores = job(opened, split=split, epoch=epoch)
    if as_json:
        show_json(scores)
    else:
        show(scores)


@app.command(
    epilog=examples(
        "acamkd benchmark runs/camvid/distilled",
        "acamkd benchmark runs/camvid/distilled --threads 1,2 --batches 1,8 --runtimes pytorch,onnxruntime",
        "acamkd benchmark runs/camvid/distilled/export/student.onnx --images 50",
    )
)
def benchmark(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL.onnx", help="Run folder, or an exported file.")],
    set_: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Its validation images, for a file outside the run that it was made of.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run of the baseline, instead of the folder `baseline` beside RUN.")
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(help="pytorch, bf16, compiled, onnxruntime, openvino, or some of them, separated by commas."),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, separated by commas. [default: one per core]")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of the throughput, separated by commas.")] = "1,2,4,8",
    images: Annotated[
        int | None, typer.Option(min=1, help="Validation images of the metric, evenly spaced. [default: all]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Timed seconds of each form.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="JSON file, instead of RUN/benchmark.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, memory and metric of a run's networks in each runtime of this machine."""
    from acamkd.jobs.benchmark import benchmark as job

    found = job.benchmark(
        model, overrides=set_ or (), recipe=recipe, baseline=baseline,
        runtimes=[name.strip() for name in runtimes.split(",")] if runtimes else job.RUNTIMES,
        threads=_counts(threads, "--threads") if threads else (), batches=_counts(batches, "--batches"),
        images=images, seconds=seconds, out=out,
    )  # fmt: skip
    if as_json:
        show_json(found.as_dict())
    else:
        show(found)


def _counts(text: str, option: str) -> list[int]:
    """`1,8` as numbers."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if 0 in counts:
        raise AcamkdError(f"{option} {text}: write whole numbers from 1 on, separated by commas, such as 1,8")
    return counts


@app.command(
    epilog=examples(
        "acamkd export runs/camvid/distilled",
        "acamkd export runs/bccd/distilled --with-nms --out build/bccd",
        "acamkd export runs/camvid/distilled --int8 --max-drop 0.5",
        "acamkd export runs/camvid/distilled --openvino",
        "acamkd export runs/camvid/distilled --license apache-2.0 --push-to-hub me/camvid-student",
    )
)
def export(
    run: RunFolder,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Output folder, instead of RUN/export.")] = None,
    with_nms: Annotated[
        bool,
        typer.Option("--with-nms", help="Detection: the full graph with its suppression, for single images."),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also an INT8 file, calibrated on training images; its loss is a condition.")
    ] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="Also each file in OpenVINO's own form.")] = False,
    max_drop: Annotated[float, typer.Option(min=0, help="Points of the metric that INT8 may lose.")] = 1.0,
    license_: Annotated[str | None, typer.Option("--license", help="Of the weights, for the model card.")] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to the Hugging Face Hub, to a private repository if new."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that the folder holds.")] = False,
) -> None:
    """Export a run's network to ONNX, checked against PyTorch, with weights and a model card."""
    opened = run_of(run, set_)
    from acamkd.jobs.export import export as job

    if push_to_hub:
        job.check_repository(push_to_hub)
    exported = job.export(
        opened, out=out, overwrite=overwrite, with_nms=with_nms, int8=int8, openvino=openvino, max_drop=max_drop,
        license=license_,
    )  # fmt: skip
    show(exported)
    if push_to_hub:
        typer.echo(job.push_to_hub(exported.folder, push_to_hub))


@app.command(
    epilog=examples(
        "acamkd predict runs/camvid/distilled street.jpg",
        "acamkd predict runs/bccd/distilled/export/student.onnx images/ --out found --score 0.5",
        "acamkd predict runs/camvid/distilled/export/student.onnx drive.mp4",
        "acamkd predict runs/camvid/distilled/export/student.onnx rtsp://192.168.1.20/stream --write json",
        "acamkd predict runs/bccd/distilled/export/student.onnx inbox/ --watch",
    )
)
def predict(
    model: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="Run folder, or an exported file.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="An image, a folder of them, a video, the number of a camera, or rtsp://HOST/PATH."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Output folder, instead of RUN/predictions, or `predictions` beside a file.")
    ] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Detections below this score are left out.")] = 0.3,
    write: Annotated[
        str, typer.Option(help="What to write, separated by commas: overlays, masks, json.")
    ] = "overlays,masks,json",
    live: Annotated[
        bool, typer.Option("--live", help="Play a video file at its own pace, as if it came from a camera.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for more images in the folder.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0, help="End of a live source; Ctrl-C ends it too.")] = None,
) -> None:
    """Predict on images, a video or a camera: overlays, boxes as JSON or masks as PNG."""
    from acamkd.jobs.predict.predict import predict as job

    names = [name.strip() for name in write.split(",")]
    job(model, source, out=out, score=score, write=names, live=live, watch=watch, seconds=seconds)


@app.command(
    epilog=examples(
        "acamkd report runs/camvid/distilled",
        "acamkd report runs/camvid/distilled --baseline runs/camvid/baseline-1 --set data.root=/data/camvid",
    )
)
def report(
    run: RunFolder,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="Run of the baseline, instead of the folder `baseline` beside RUN."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a run's report.html, or write it again: scores, masks over the epochs, and the sources of the gain."""
    opened, alone = run_of(run, set_), run_of(baseline) if baseline else None
    from acamkd.report.run import write_report

    write_report(opened, alone)
