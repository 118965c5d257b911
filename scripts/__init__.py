"""The commands of the ESD project (satellite tiles), kept for those who know them; the main road is tune.py.

    python -m scripts.train --model_type=SegmentationCNN --max_epochs=5
    python -m scripts.evaluate --model_path=models/SegmentationCNN/last.ckpt
    python -m scripts.train_sweeps --sweep_file=sweeps.yml

Each reads the project's flags and calls what `python -m workloads` and `tune.py` call.
"""
