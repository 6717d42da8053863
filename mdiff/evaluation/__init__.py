"""Evaluation metrics: bounds, image metrics, ranking, probes and the self-test."""

from mdiff.evaluation.classifier import Classifier as Classifier
from mdiff.evaluation.classifier import load_classifier as load_classifier
from mdiff.evaluation.evaluate import Evaluation as Evaluation
from mdiff.evaluation.evaluate import evaluate as evaluate
from mdiff.evaluation.evaluate import sample_figures as sample_figures
from mdiff.evaluation.image_metrics import require_inception as require_inception
from mdiff.evaluation.images import OF_SAMPLES as OF_SAMPLES
from mdiff.evaluation.images import conditional_bounds as conditional_bounds
from mdiff.evaluation.images import draw_pictures as draw_pictures
from mdiff.evaluation.images import figures_of as figures_of
from mdiff.evaluation.images import probe_figures as probe_figures
from mdiff.evaluation.images import spread as spread
from mdiff.evaluation.images import with_model_labels as with_model_labels
from mdiff.evaluation.order import order_figures as order_figures
from mdiff.evaluation.selftest import check_samplers as check_samplers
from mdiff.evaluation.selftest import reveal_rates as reveal_rates
